// Edit and run a lesson's JavaScript cells in the page. Without this file the page shows code and stored outputs.
//
// A run goes through a sandboxed frame of its own (no origin, no network) and a worker in it, which can be stopped at any
// moment. Cells share their variables as in the notebook: a run begins with all cells above, each a block inside the block
// of the one before, so that a later cell may declare a name again.
(() => {
  "use strict";
  const LIMIT = 5000; // Milliseconds for the cells above, and again for the cell itself.
  const MOST = 500; // Lines of output.

  // In the worker ------------------------------------------------------------------------------------------------------
  function work(MOST) {
    const post = postMessage.bind(self);
    const AsyncFunction = (async () => {}).constructor;
    let begun = false, told = 0;
    const tell = (kind, text) => {
      if (begun && ++told <= MOST) post({ kind, text });
      else if (told === MOST + 1) post({ kind: "stderr", text: "… and more, which is left out." });
    };

    // Values as Deno prints them: https://docs.deno.com/api/deno/~/Deno.inspect
    function inspect(value, level = 0, above = []) {
      const quote = (text) => (text.includes('"') && !text.includes("'") ? `'${text}'` : JSON.stringify(text));
      if (typeof value === "string") return quote(value);
      if (typeof value === "bigint") return `${value}n`;
      if (Object.is(value, -0)) return "-0";
      if (value === null || !/object|function/.test(typeof value)) return String(value);
      if (above.includes(value)) return "[Circular]";
      let head = "", open = "{", close = "}", items = [];
      const inner = (one) => inspect(one, level + 1, [...above, value]);
      const made = value.constructor?.name;
      let keys = Reflect.ownKeys(value).filter((key) => Object.getOwnPropertyDescriptor(value, key).enumerable);
      if (typeof value === "function") {
        const text = Function.prototype.toString.call(value);
        const parent = Object.getPrototypeOf(value)?.name;
        head = text.startsWith("class")
          ? `[class ${value.name || "(anonymous)"}${parent ? ` extends ${parent}` : ""}]`
          : `[${made}${value.name ? `: ${value.name}` : " (anonymous)"}]`;
      } else if (value instanceof Error) head = `${value.name}: ${value.message}`;
      else if (value instanceof Date) head = value.toISOString();
      else if (value instanceof RegExp) head = String(value);
      else if (value instanceof String || value instanceof Number || value instanceof Boolean) {
        head = `[${made}: ${inspect(value.valueOf())}]`;
        keys = keys.filter((key) => !/^\d+$/.test(String(key)));
      }
      if (head && !keys.length) return head;
      if (level > 4) return Array.isArray(value) ? "[Array]" : `[${made ?? "Object"}]`;
      if (Array.isArray(value)) {
        [open, close] = "[]";
        items = Array.from(value, inner);
        keys = keys.filter((key) => !/^\d+$/.test(String(key)));
      } else if (value instanceof Map) {
        head = `Map(${value.size})`;
        items = [...value].map(([key, one]) => `${inner(key)} => ${inner(one)}`);
      } else if (value instanceof Set) {
        head = `Set(${value.size})`;
        items = [...value].map(inner);
      } else if (!head && made !== "Object") head = made ?? "[Object: null prototype]";
      for (const key of keys) {
        const name = typeof key === "symbol" ? String(key) : /^[a-z_$][\w$]*$/i.test(key) ? key : quote(key);
        const found = Object.getOwnPropertyDescriptor(value, key);
        items.push(`${name}: ${"value" in found ? inner(found.value) : found.set ? "[Getter/Setter]" : "[Getter]"}`);
      }
      const lead = head ? `${head} ` : "";
      if (!items.length) return `${lead}${open}${close}`;
      const length = items.join("").length + 2 * items.length + 2 * level + lead.length + 11;
      if (length <= 80 && !items.join().includes("\n")) return `${lead}${open} ${items.join(", ")} ${close}`;
      const indent = "\n" + "  ".repeat(level + 1);
      return `${lead}${open}${indent}${items.join(`,${indent}`)}\n${"  ".repeat(level)}${close}`;
    }

    function format(values) {
      const show = (value) => (typeof value === "string" ? value : inspect(value));
      if (typeof values[0] !== "string" || values.length < 2) return values.map(show).join(" ");
      const [pattern, ...rest] = values;
      const filled = pattern.replace(/%([sdifoOc%])/g, (whole, kind) => {
        if (kind === "%") return "%";
        if (!rest.length) return whole;
        const value = rest.shift();
        if (kind === "c") return "";
        if (kind === "s") return show(value);
        return "oO".includes(kind) ? inspect(value) : kind === "f" ? parseFloat(value) : parseInt(value);
      });
      return [filled, ...rest.map(show)].join(" ");
    }

    for (const name of ["log", "info", "debug", "table", "dir"]) console[name] = (...values) => tell("stdout", format(values));
    for (const name of ["warn", "error", "trace"]) console[name] = (...values) => tell("stderr", format(values));

    const why = (error) => (error instanceof Error || error instanceof DOMException ? `${error.name}: ${error.message}` : `Uncaught ${inspect(error)}`);
    const compiles = (text) => {
      try {
        new AsyncFunction(`"use strict"; ${text}\n`);
        return true;
      } catch {
        return false;
      }
    };

    // The last expression becomes the cell's value.
    function returning(code) {
      const text = code.trimEnd().replace(/;+$/, "");
      for (let start = text.length - 1; start >= 0; start--) {
        if (start && !"\n;".includes(text[start - 1])) continue;
        const [before, last] = [text.slice(0, start), text.slice(start).trim()];
        if (!last || /^(async\s+function|function|class|let)\b/.test(last)) continue;
        if (compiles(`return (${last}\n)`) && compiles(before)) return `${before}\nreturn (${last}\n)`;
      }
      return code;
    }

    self.onmessage = async ({ data: cells }) => {
      const own = cells.at(-1);
      const begin = `begin_${Math.random().toString(36).slice(2)}`;
      self[begin] = () => {
        delete self[begin];
        begun = true;
        post({ kind: "begun" });
      };
      let value;
      try {
        for (const code of cells) {
          begun = code === own;
          new AsyncFunction(`"use strict"; ${code}\n`);
        }
        begun = false;
        const blocks = [...cells.slice(0, -1), `${begin}();\n${returning(own)}`].map((code) => `{ ${code}\n`);
        value = await (0, eval)(`(async () => { "use strict"; ${blocks.join("")}${"}".repeat(blocks.length)} })()`);
        if (value !== undefined) tell("value", inspect(value));
      } catch (error) {
        const above = begun ? "" : "A cell above failed. ";
        begun = true;
        tell("error", above + why(error));
      }
      post({ kind: "done" });
    };
  }

  // In the frame -------------------------------------------------------------------------------------------------------
  function frame(source, LIMIT) {
    const tell = (message) => parent.postMessage(message, "*");
    addEventListener("message", ({ data: cells }) => {
      const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      const stop = () => {
        worker.terminate();
        tell({ kind: "stopped" });
      };
      let limit = setTimeout(stop, LIMIT);
      worker.onmessage = ({ data }) => {
        if (data.kind === "begun") {
          clearTimeout(limit);
          limit = setTimeout(stop, LIMIT);
        } else tell(data);
        if (data.kind === "done") {
          clearTimeout(limit);
          worker.terminate();
        }
      };
      worker.onerror = (event) => {
        event.preventDefault();
        tell({ kind: "error", text: event.message || "The sandbox could not be started in this browser." });
        tell({ kind: "done" });
      };
      worker.postMessage(cells);
    });
    tell({ kind: "ready" });
  }

  const policy = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob: data:; worker-src blob:";
  const script = `(${frame})(${JSON.stringify(`(${work})(${MOST})`)}, ${LIMIT})`.replaceAll("</", "<\\/");
  const sandbox = `<!doctype html><meta http-equiv="Content-Security-Policy" content="${policy}"><script>${script}</script>`;

  // In the page --------------------------------------------------------------------------------------------------------
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  const all = [...document.querySelectorAll("article .cell")].filter((cell) => cell.querySelector(".cell_input pre"));
  const runnable = all.filter((cell) => !cell.classList.contains("tag_deno-only"));
  const states = runnable.map((cell, index) => new Cell(cell, index));

  function Cell(cell, index) {
    const input = cell.querySelector(".cell_input");
    const shown = input.querySelector("pre").closest("[class*=highlight-]") ?? input.firstElementChild;
    const stored = cell.querySelector(".cell_output");
    this.stored = input.querySelector("pre").textContent.trimEnd();
    this.solution = cell.classList.contains("tag_solution");
    this.code = () => (this.editor ? this.editor.value : this.stored);
    this.edited = () => this.code().trimEnd() !== this.stored;

    const run = element("button", { type: "button", className: "js-button js-run", textContent: "Run" });
    const edit = element("button", { type: "button", className: "js-button js-edit", textContent: "Edit" });
    const reset = element("button", { type: "button", className: "js-button js-reset", textContent: "Reset", hidden: true });
    for (const button of [run, edit, reset]) button.setAttribute("aria-label", `${button.textContent} cell ${index + 1}`);
    const status = element("span", { className: "js-status" });
    status.setAttribute("role", "status");
    const live = element("div", { className: "cell_output docutils container js-live", hidden: true });
    input.after(element("div", { className: "js-bar" }, run, edit, reset, status), live);

    const fit = () => {
      this.editor.rows = this.editor.value.split("\n").length + 1;
    };
    edit.onclick = () => {
      this.editor = element("textarea", { className: "js-editor", value: this.stored, spellcheck: false, wrap: "off" });
      this.editor.setAttribute("aria-label", `Code of cell ${index + 1}`);
      this.editor.autocapitalize = "off";
      this.editor.oninput = fit;
      this.editor.onkeydown = (event) => {
        if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey || event.shiftKey)) return;
        event.preventDefault();
        run.click();
      };
      fit();
      shown.hidden = true;
      input.append(this.editor);
      edit.hidden = true;
      reset.hidden = false;
      this.editor.setSelectionRange(0, 0);
      this.editor.focus();
    };
    reset.onclick = () => {
      this.stop?.();
      this.editor?.remove();
      delete this.editor;
      shown.hidden = false;
      live.hidden = true;
      live.replaceChildren();
      if (stored) stored.hidden = false;
      status.textContent = "";
      edit.hidden = false;
      reset.hidden = true;
      edit.focus();
    };
    run.onclick = () => {
      if (this.stop) return this.stop();
      const cells = states.slice(0, index + 1).filter((one, at) => one === this || !(one.solution && states[at - 1]?.edited()));
      live.replaceChildren();
      if (stored) stored.hidden = true;
      live.hidden = false;
      reset.hidden = false;
      run.textContent = "Stop";
      status.textContent = "Running …";
      delete live.dataset.done;
      const show = (kind, text) => {
        const last = live.lastElementChild;
        if (last?.dataset.kind === kind && kind.startsWith("std")) last.querySelector("pre").append(`${text}\n`);
        else {
          const pre = element("pre", { tabIndex: 0 }, `${text}\n`);
          const box = element("div", { className: `output ${kind === "value" ? "text_plain" : kind === "stdout" ? "stream" : "stderr"}` });
          box.append(element("div", { className: "highlight" }, pre));
          box.dataset.kind = kind;
          live.append(box);
        }
      };
      const place = element("iframe", { title: "Sandbox", hidden: true, srcdoc: sandbox });
      place.setAttribute("sandbox", "allow-scripts");
      const hear = ({ source, data }) => {
        if (source !== place.contentWindow) return;
        if (data.kind === "ready") place.contentWindow.postMessage(cells.map((one) => one.code()), "*");
        else if (data.kind === "done") end("Ran in your browser.");
        else if (data.kind === "stopped") {
          show("error", `Stopped after ${LIMIT / 1000} seconds: is there a loop without an end?`);
          end("");
        } else show(data.kind, data.text);
      };
      const end = (words) => {
        removeEventListener("message", hear);
        place.remove();
        delete this.stop;
        run.textContent = "Run";
        status.textContent = words;
        live.dataset.done = "true";
        if (!live.firstElementChild) live.hidden = true;
      };
      this.stop = () => end("Stopped.");
      addEventListener("message", hear);
      document.body.append(place);
    };
  }

  for (const cell of all)
    if (!runnable.includes(cell)) {
      const note = "This cell needs Deno, which may read files and start programs: here you see the stored output.";
      cell.append(element("p", { className: "js-note" }, note));
    }
  const key = (name) => element("kbd", { textContent: name });
  all[0]?.before(
    element(
      "div",
      { className: "js-intro" },
      element("p", {}, element("strong", { textContent: "These cells run in your browser. " }),
        "Edit one and run it, with the button or with ", key("Ctrl"), " ", key("Enter"),
        `. All cells above run first, as they stand, in a fresh sandbox without network, for ${LIMIT / 1000} seconds at most. `,
        "Once you have changed an exercise's cell, its folded solution is left out. Reset brings back the stored code and output."),
    ),
  );
})();
