#!/bin/sh
exec /opt/java/openjdk/bin/java -cp '/opt/kafka/libs/*' -Dlog4j2.configurationFile=/etc/kafka/docker/log4j2.properties \
    $KAFKA_HEAP_OPTS $KAFKA_OPTS kafka.Kafka "$@"
