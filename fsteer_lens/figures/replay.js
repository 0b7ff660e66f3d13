// The replay's script: it chooses a token, lays the score out in lines with labels, and draws what the inspector shows.
// The score itself is on the page already. Each replay on a page is begun once, by whichever script comes first.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const FLOOR = 1e-5;
  const STEP = 700;

  function element(name, attributes = {}, ...children) {
    const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  const svg = (name, attributes, ...children) => element(`svg:${name}`, attributes, ...children);
  const text = (x, y, words, anchor = "start", kind = "") =>
    svg("text", { x, y, "text-anchor": anchor, class: kind, dy: "0.32em" }, words);

  function percent(chance) {
    const share = 100 * chance;
    if (share < 0.01) return "< 0.01 %";
    return `${share >= 9.5 ? share.toFixed(0) : Number(share.toPrecision(2))} %`;
  }

  // Where a probability stands on a log axis from 1 at the top.
  const chanceScale = (top, bottom) => (chance) =>
    top + ((bottom - top) * Math.log10(Math.max(chance, FLOOR))) / Math.log10(FLOOR);

  // Names of the first block, one half way up and the last, `x` being where each place stands.
  function layerAxis(picture, layers, x, y, centre) {
    for (const place of new Set([0, Math.floor((layers.length - 1) / 2), layers.length - 1])) {
      picture.append(text(x(place), y, `${layers[place]}`, "middle", "m"));
    }
    picture.append(text(centre, y + 14, "after block", "middle", "m"));
  }

  // Places from top to bottom at least `gap` apart, as near as possible to those wanted.
  function apart(wanted, gap, low, high) {
    const order = wanted.map((_, index) => index).sort((a, b) => wanted[a] - wanted[b]);
    const found = [...wanted];
    let last = low - gap;
    for (const index of order) last = found[index] = Math.max(found[index], last + gap);
    let limit = high + gap;
    for (const index of [...order].reverse()) limit = found[index] = Math.min(found[index], limit - gap);
    return found;
  }

  // Quantised numbers, bytes in base64, as nested lists; lists as they are.
  function unpacked(given, value) {
    if (Array.isArray(given)) return given;
    const levels = Uint8Array.from(atob(given.levels), (one) => one.charCodeAt(0));
    let found = Array.from(levels, (level) => value(level / 255));
    for (const size of given.shape.slice(1).reverse()) {
      found = Array.from({ length: found.length / size }, (_, row) => found.slice(row * size, (row + 1) * size));
    }
    return found;
  }

  class Run {
    constructor(section, given, replay) {
      const data = {
        ...given,
        size: unpacked(given.size, (share) => share * given.size.most),
        lens: unpacked(given.lens, (share) => FLOOR ** share),
      };
      Object.assign(this, { section, data, replay });
      this.score = section.querySelector(".score");
      this.labels = section.querySelector(".labels");
      this.columns = [...section.querySelectorAll(".c")];
      this.say = section.querySelector(".say");
      this.inspector = section.querySelector(".inspector");
      this.at = data.prompt;
      this.columns.forEach((column, index) => {
        column.setAttribute("aria-pressed", "false");
        column.addEventListener("click", () => { replay.stop(); this.choose(index); });
      });
      section.addEventListener("keydown", (event) => this.key(event));
      new ResizeObserver(() => this.layOut()).observe(this.score);
    }

    get last() { return this.columns.length - 1; }

    key(event) {
      const moves = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: this.last };
      if (!(event.key in moves) && event.key !== " ") return;
      if (event.altKey || event.ctrlKey || event.metaKey || !event.target.closest(".c")) return;
      event.preventDefault();
      if (event.key === " ") return this.replay.toggle(this);
      this.replay.stop();
      this.choose(moves[event.key], true);
    }

    choose(index, focus = false) {
      index = Math.min(Math.max(index, 0), this.last);
      const old = this.columns[this.at];
      old.setAttribute("aria-pressed", "false");
      old.tabIndex = -1;
      this.score.querySelectorAll(".from").forEach((one) => one.classList.remove("from"));
      this.at = index;
      const column = this.columns[index];
      column.setAttribute("aria-pressed", "true");
      column.tabIndex = 0;
      if (index >= this.data.prompt) this.columns[index - 1].classList.add("from");
      if (focus) column.focus({ preventScroll: false });
      this.say.textContent = this.data.say[index];
      this.inspect();
      this.replay.remember(this);
    }

    // A label column at the head of every line, so that no line has to be read without.
    layOut() {
      if (!this.score.clientWidth || this.score.clientWidth === this.width) return;
      this.width = this.score.clientWidth;
      this.score.querySelectorAll(".labels.again").forEach((one) => one.remove());
      const room = this.width - this.labels.offsetWidth - 1;
      let used = 0;
      for (const column of this.columns) {
        const wide = column.getBoundingClientRect().width;
        if (used && used + wide > room) {
          const again = this.labels.cloneNode(true);
          again.classList.add("again");
          this.score.insertBefore(again, column);
          used = 0;
        }
        used += wide;
      }
    }

    inspect() {
      const step = this.at - this.data.prompt, position = step < 0 ? this.at : this.at - 1;
      const parts = step < 0 ? [] : [this.candidates(step), this.lens(step)];
      if (this.data.names.length) parts.push(this.mix(position));
      parts.push(this.sizes(position));
      if (step >= 0 && this.data.released[step] !== undefined) parts.push(this.released(step));
      this.inspector.replaceChildren(...parts);
    }

    figure(title, caption, ...content) {
      return element("figure", {}, element("h4", {}, title), ...content, element("figcaption", {}, caption));
    }

    candidates(step) {
      const rows = this.data.candidates[step], top = 14, bottom = 196, left = 120, right = 210;
      const y = chanceScale(top, bottom);
      const low = [1, 2].map((side) => Math.min(...rows.map((row) => row[side] ?? 1)));
      const spots = rows.map((row) => [y(row[1] ?? low[0]), y(row[2] ?? low[1])]);
      const picture = svg("svg", { viewBox: "0 0 330 226", role: "img", "aria-label": "likely tokens, unsteered and steered" });
      for (const chance of [1, 0.1, 0.01, 0.001, 0.0001]) {
        picture.append(svg("path", { class: "axis", d: `M${left} ${y(chance)}H${right}` }));
      }
      const said = this.data.texts[this.data.prompt + step];
      const other = this.data.displaced[step];
      const at = [0, 1].map((side) => apart(spots.map((spot) => spot[side]), 15, top, bottom + 8));
      rows.forEach(([word, base, steered], index) => {
        const [from, to] = spots[index];
        const kind = word === said ? "one" : word === other ? "two" : "other";
        const known = base !== null && steered !== null ? "" : "dash";
        picture.append(svg("path", { class: `${kind} ${known}`, d: `M${left} ${from}L${right} ${to}` }));
        const dim = kind === "other" ? "m" : "";
        if (base !== null) picture.append(text(left - 6, at[0][index], `${word} ${percent(base)}`, "end", dim));
        if (steered !== null) picture.append(text(right + 6, at[1][index], `${word} ${percent(steered)}`, "start", dim));
      });
      return this.figure("Next word: unsteered → steered", "log scale; dashed: not among the likeliest on one side", picture);
    }

    lens(step) {
      const { layers, edited, lens } = this.data, top = 14, bottom = 186, left = 52, right = 226;
      const x = (place) => left + ((right - left) * place) / Math.max(layers.length - 1, 1);
      const y = chanceScale(top, bottom);
      const picture = svg("svg", { viewBox: "0 0 330 226", role: "img", "aria-label": "two words through the layers" });
      for (const chance of [1, 0.1, 0.01, 0.001, 0.0001]) {
        picture.append(svg("path", { class: "axis", d: `M${left} ${y(chance)}H${right}` }));
        picture.append(text(left - 5, y(chance), percent(chance).replace("< ", ""), "end", "m"));
      }
      for (const layer of edited) {
        const at = x(layers.indexOf(layer));
        picture.append(svg("path", { class: "edit", d: `M${at} ${top}V${bottom}` }), text(at, top - 8, "edit", "middle", "m"));
      }
      const words = [this.data.texts[this.data.prompt + step], this.data.displaced[step]];
      const ends = [], named = [];
      words.forEach((word, number) => ["steered", "unsteered"].forEach((run, side) => {
        const line = lens[number][side].map((row, place) => `${x(place).toFixed(1)} ${y(row[step]).toFixed(1)}`);
        const kind = `${number ? "two" : "one"} ${side ? "dash" : ""}`;
        picture.append(svg("path", { class: kind, d: `M${line.join("L")}` }));
        ends.push(y(lens[number][side].at(-1)[step]));
        named.push(`${word} ${run}`);
      }));
      apart(ends, 14, top, bottom + 10).forEach((at, index) => picture.append(text(right + 6, at, named[index])));
      layerAxis(picture, layers, x, bottom + 14, (left + right) / 2);
      return this.figure("Through the layers: which word is winning", "logit lens; solid: steered, dashed: unsteered", picture);
    }

    mix(position) {
      const { names, weights, added } = this.data, left = 118, wide = 150, row = 22;
      const height = names.length * row + 8;
      const picture = svg("svg", { viewBox: `0 0 330 ${height}`, role: "img", "aria-label": "weights of the experts" });
      names.forEach((name, index) => {
        const y = index * row + 4, routed = weights[position][index] ?? 0, acting = added[position][index] ?? 0;
        const short = name.length > 17 ? `${name.slice(0, 16)}…` : name;
        picture.append(
          text(left - 8, y + 8, short, "end"),
          svg("rect", { x: left, y, width: wide * acting, height: 16, fill: `var(--e${index})` }),
          svg("rect", { x: left, y, width: Math.max(wide * routed, 1), height: 16, fill: "none", stroke: `var(--e${index})`, "stroke-width": 1.5 }),
        );
        if (routed >= 0.005) picture.append(text(left + wide * routed + 6, y + 8, routed.toFixed(2)));
      });
      return this.figure("Mix of experts", "outline: routed; filled: added here, weight × gate", picture);
    }

    sizes(position) {
      const { layers, edited, size } = this.data, values = size[position] ?? [], left = 52, right = 316, bottom = 96;
      const most = Math.max(...size.flat(), 1e-9), wide = (right - left) / layers.length;
      const picture = svg("svg", { viewBox: "0 0 330 132", role: "img", "aria-label": "size of the change in every layer" });
      for (const share of [0, 0.5, 1]) {
        const y = bottom - 84 * share;
        picture.append(svg("path", { class: "axis", d: `M${left} ${y}H${right}` }), text(left - 5, y, (most * share).toPrecision(2), "end", "m"));
      }
      values.forEach((value, place) => {
        const tall = (84 * value) / most, here = edited.includes(layers[place]);
        picture.append(svg("rect", {
          x: left + wide * place + wide * 0.1, y: bottom - tall, width: wide * 0.8, height: tall,
          fill: here ? "var(--steered)" : "rgb(8, 138, 142)",
        }));
      });
      layerAxis(picture, layers, (place) => left + wide * (place + 0.5), bottom + 13, (left + right) / 2);
      const where = this.data.texts[position];
      return this.figure(`The stream at “${where}”: ‖Δ‖ / ‖h‖`, "steered minus unsteered; the edited layer in the colour of the edit", picture);
    }

    released(step) {
      const before = this.data.answer.slice(0, step).join("");
      const told = element("p", { class: "released", dir: "auto" }, before, element("b", {}, this.data.released[step]), " …");
      return this.figure("Released here", "how the unsteered model would have gone on from this token", told);
    }
  }

  class Replay {
    constructor(root) {
      this.root = root;
      const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
      this.runs = [...root.querySelectorAll("section.run")].map((one, index) => new Run(one, data[index], this));
      this.chips = root.querySelector(".chips");
      this.shown = 0;
      this.pinned = null;
      this.began = false;
      const told = /^#replay=(\d+)\.(\d+)$/.exec(this.links ? location.hash : "");
      if (told && this.runs[told[1]]) this.shown = Number(told[1]);
      this.drawChips();
      this.show(this.shown, told && this.runs[told[1]] ? Number(told[2]) : undefined);
      this.began = true;
    }

    // A notebook has no address of its own for a token.
    get links() { return !document.querySelector(".jp-Notebook, #notebook, .vscode-dark, .vscode-light"); }

    remember(run) {
      if (!this.began || !this.links) return;
      try { history.replaceState(null, "", `#replay=${this.runs.indexOf(run)}.${run.at}`); } catch { /* a sandbox */ }
    }

    drawChips() {
      const parts = [];
      const group = (label, values, change) => {
        if (values.length < 2) return;
        parts.push(element("b", {}, label));
        for (const value of values) {
          const chip = element("button", { type: "button", "data-kind": label, "data-value": value }, value);
          chip.addEventListener("click", () => change(value));
          parts.push(chip);
        }
      };
      const of = (kind) => [...new Set(this.runs.map((run) => run.section.dataset[kind]))];
      const go = (variant, prompt) => {
        const found = this.runs.findIndex(({ section: { dataset } }) => dataset.variant === variant && dataset.prompt === prompt);
        if (found >= 0) this.show(found);
      };
      const here = () => this.runs[this.shown].section.dataset;
      group("prompt", of("prompt"), (prompt) => go(here().variant, prompt));
      group("steering", of("variant"), (variant) => go(variant, here().prompt));
      this.play = element("button", { type: "button" }, "▶ play");
      this.play.addEventListener("click", () => this.toggle(this.runs[this.shown]));
      parts.push(this.play);
      if (this.runs.length > 1) {
        this.pin = element("button", { type: "button", "aria-pressed": "false" }, "pin this one");
        this.pin.addEventListener("click", () => {
          this.pinned = this.pinned === null ? this.shown : null;
          this.show(this.shown);
        });
        parts.push(this.pin);
      }
      this.chips.replaceChildren(...parts);
      this.chips.hidden = false;
    }

    show(index, at) {
      this.stop();
      this.shown = index;
      this.runs.forEach((run, number) => { run.section.hidden = number !== index && number !== this.pinned; });
      this.root.classList.toggle("two", this.pinned !== null && this.pinned !== index);
      const { variant, prompt } = this.runs[index].section.dataset;
      for (const chip of this.chips.querySelectorAll("[data-kind]")) {
        const current = chip.dataset.kind === "prompt" ? prompt : variant;
        chip.setAttribute("aria-pressed", String(chip.dataset.value === current));
      }
      if (this.pin) {
        this.pin.setAttribute("aria-pressed", String(this.pinned !== null));
        this.pin.textContent = this.pinned === null ? "pin this one" : "let go of the pinned one";
      }
      const run = this.runs[index];
      run.layOut();
      run.choose(at ?? run.at);
    }

    toggle(run) { return this.timer ? this.stop() : this.start(run); }

    start(run) {
      run.choose(run.at >= run.last ? run.data.prompt : Math.max(run.at + 1, run.data.prompt));
      this.play.textContent = "■ stop";
      this.timer = setInterval(() => {
        if (!this.root.isConnected || run.at >= run.last) return this.stop();
        run.choose(run.at + 1);
      }, STEP);
    }

    stop() {
      clearInterval(this.timer);
      this.timer = null;
      if (this.play) this.play.textContent = "▶ play";
    }
  }

  for (const root of document.querySelectorAll(".fsteer-replay:not([data-begun])")) {
    root.dataset.begun = "";
    new Replay(root);
  }
})();
