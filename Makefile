# `make` prints what there is to do. Recipes name relative paths only: make cannot hold a path with a space in it.
.PHONY: able help setup lab book site notebooks test faults soak conformance lint links audit bench requirements clean
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
unexport PYTHONPATH PYTHONHOME

bin := .venv/bin
export PYTHONUTF8 := 1
export JUPYTER_PREFER_ENV_PATH := 1

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' Makefile

setup: ## Make .venv with everything that the book and the lab need
	@sh env/setup.sh

lab: setup ## Start the lab and open JupyterLab on the notebooks
	@$(bin)/lab up
	@eval "$$($(bin)/lab env)" && exec $(bin)/jupyter lab --allow-root --ServerApp.root_dir=notebooks

able: # In the first second, before anything is installed; `lab doctor --quick` then looks closer.
	@[ -n "$$LAB_CLUSTER" ] || { [ "$$(uname)" = Linux ] && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; }; } || { echo \
		"The embedded cluster needs Linux, and root or sudo. Name a cluster of your own with LAB_CLUSTER=context:NAME," \
		"or build the site from the stored outputs: make site" >&2; exit 1; }

book: able setup ## Execute every notebook on the lab and build the site into _build/html
	@$(bin)/lab doctor --quick
	@$(bin)/lab build
	@$(bin)/lab up
	@$(bin)/python -m lab.book build

site: setup ## Build the site from the stored outputs, without a lab
	@$(bin)/python -m lab.book build --stored

notebooks: setup ## Execute the notebooks and store their outputs (ONLY=notebooks/… for one)
	@$(bin)/lab build
	@$(bin)/lab up
	@$(bin)/python -m lab.book store $(ONLY)

test: setup ## Run every test that can run here; the lab is started and stopped if need be
	@$(bin)/lab build
	@$(bin)/pytest

faults: setup ## Break the lab in every way, and see it get well and leave nothing behind (15 minutes)
	@$(bin)/lab build
	@$(bin)/pytest tests/faults -m "slow or not slow"

soak: setup ## Run every notebook N times against its stored outputs (N=10; BUSY=1 keeps a processor busy)
	@$(bin)/lab build
	@$(bin)/python tests/soak.py --rounds $(or $(N),10) --busy $(or $(BUSY),0) $(ONLY)

conformance: setup ## Run Kubernetes' own tests of what the book teaches against the cluster (FOCUS=… for a part)
	@$(bin)/python tests/conformance/run.py

lint: setup ## Check code, notebooks, spelling and the site's links
	@$(bin)/pytest tests/lint tests/site/test_links.py

bench: setup ## Measure starting, stopping and idling the lab
	@$(bin)/lab bench

links: setup ## Check the links to other sites (needs the internet)
	@$(bin)/python -m lab.book build --stored --builder linkcheck

audit: setup ## Look for known vulnerabilities in everything that is pinned (needs the internet)
	@$(bin)/python tests/audit.py

requirements: setup ## Write requirements.txt from requirements.in
	@$(bin)/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		--no-emit-index-url --no-emit-find-links requirements.in --output-file requirements.txt

clean: ## Remove what was built; the lab and its cache stay (lab down --purge)
	rm -rf _build .pytest_cache .ruff_cache
