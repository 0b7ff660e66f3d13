// The page: controls, counts, texts, and what ties them to the kernel. Last of the three parts of the widget's module.

const PATIENCE = 4000; // milliseconds without a sign of the kernel until the reader is told
const OWN = "own";
let views = 0; // radio buttons are grouped by name over the whole page

const clone = (value) => JSON.parse(JSON.stringify(value));

function slider(name, attributes, change, release) {
  const input = html("input", { type: "range", ...attributes });
  const value = html("output");
  const element = html("label", { className: `slider ${name}` }, html("span", { textContent: name }), input, value);
  input.addEventListener("input", () => change(Number(input.value)));
  input.addEventListener("change", release);
  return { element, input, value };
}

function checkbox(name, text, change) {
  const input = html("input", { type: "checkbox" });
  const element = html("label", { className: `switch ${name}` }, input, html("span", { textContent: text }));
  input.addEventListener("change", () => change(input.checked));
  return { element, input };
}

/** The controls; `change(settings)` is called at every move, `release()` when a move is over. */
function controlPanel(data, change, release) {
  let settings = null;
  const set = (changes) => change({ ...settings, ...changes });
  const now = (changes) => (set(changes), release());
  const gated = data.columns > 0;
  const ranked = data.ranks > 0;
  const calibrated = gated && !data.composed;
  const radios = `fsteer-rank-${(views += 1)}`;

  const modes = ["gate", "ablation"].map((mode) => {
    const input = html("input", { type: "radio", name: radios, value: mode, disabled: !ranked });
    input.addEventListener("change", () => now({ mode }));
    const title =
      mode === "gate"
        ? "The rank of the subspace that the gate looks at"
        : "Instead of steering, take the subspace of this rank out of every token";
    return html("label", { title }, input, html("span", { textContent: mode }));
  });
  const rank = slider("rank", { min: 1, max: data.ranks || 1, step: 1 }, (value) => set({ rank: value }), release);
  const threshold = slider(
    "threshold",
    { min: data.bounds[0], max: data.bounds[1], step: (data.bounds[1] - data.bounds[0]) / 1000 },
    (value) => set({ threshold: value }),
    release,
  );
  const reset = html("button", { type: "button", textContent: "use the calibrated threshold" });
  reset.addEventListener("click", () => now({ threshold: null }));
  const [least, most] = data.strengths;
  const strength = slider(
    "strength",
    { min: least, max: most, step: 0.05 },
    (value) => set({ strength: value }),
    release,
  );
  const gate = checkbox("gate", "gate (off: always open)", (on) => now({ gate: on }));
  const residual = checkbox("residual", "residual", (on) => now({ residual: on }));
  const experts = data.experts.map((colour, index) => {
    const one = checkbox("expert", short(data.names[index], 24), (on) =>
      now({ experts: settings.experts.map((was, other) => (other === index ? on : was)) }),
    );
    const swatch = html("i");
    swatch.style.background = colour;
    one.element.insertBefore(swatch, one.element.lastChild);
    return one;
  });
  const element = html(
    "div",
    { className: "controls" },
    html("div", { className: "modes" }, html("span", { textContent: "rank of the" }), ...modes),
    rank.element,
    threshold.element,
    reset,
    strength.element,
    gate.element,
    residual.element,
    html(
      "fieldset",
      {},
      html("legend", { textContent: "experts" }),
      ...experts.map((one) => one.element),
    ),
  );

  function draw(next, view) {
    settings = next;
    const ablated = settings.mode === "ablation";
    modes.forEach((label) => (label.firstChild.checked = label.firstChild.value === settings.mode));
    rank.input.disabled = !ranked;
    rank.input.value = settings.rank ?? 1;
    rank.value.textContent = ranked ? `${settings.rank} of ${data.ranks}` : gated ? "no ranks" : "no gate";
    threshold.input.disabled = !calibrated || ablated || !settings.gate;
    threshold.input.value = view.threshold ?? 0;
    threshold.value.textContent = view.threshold === null ? (gated ? "none" : "no gate") : view.threshold.toFixed(3);
    threshold.element.title = data.composed ? "A composed gate has no single threshold" : "";
    reset.disabled = threshold.input.disabled || settings.threshold === null;
    reset.textContent = settings.threshold === null ? "threshold as calibrated" : "back to the calibrated threshold";
    reset.hidden = !calibrated;
    strength.input.disabled = ablated;
    strength.input.value = settings.strength;
    strength.value.textContent = settings.strength.toFixed(2);
    gate.input.disabled = !gated || ablated;
    gate.input.checked = settings.gate;
    residual.input.disabled = ablated;
    residual.input.checked = settings.residual;
    const onlyOne = settings.experts.filter(Boolean).length === 1;
    experts.forEach((one, index) => {
      one.input.checked = settings.experts[index];
      one.input.disabled = ablated || (onlyOne && settings.experts[index]);
      one.element.title = onlyOne && settings.experts[index] ? "One expert has to stay on" : data.names[index];
    });
  }
  return { element, draw };
}

/** How many of each group are steered. */
function countPanel(data) {
  const numbers = data.groups.map(() => html("span", { className: "count" }));
  const rows = data.groups.map((group, index) => {
    const swatch = html("i");
    swatch.style.background = group.colour;
    const name = html("b", { textContent: short(group.name, 40), title: group.name });
    const cut = group.size < group.given ? ` (the first ${group.size} of ${group.given})` : "";
    return html("div", {}, swatch, name, " ", numbers[index], cut);
  });
  const element = html("div", { className: "counts" }, ...rows);
  element.setAttribute("aria-live", "polite");

  function draw(view, settings) {
    numbers.forEach((number, index) => {
      const size = data.groups[index].size;
      number.textContent =
        settings.mode === "ablation"
          ? `taken out of all ${size}`
          : `${view.counts[index]} of ${size} steered`;
    });
  }
  return { element, draw };
}

/** The prompt to generate for, and both texts. */
function textPanel(data, { model, current, select }) {
  const list = html("select", { title: "prompt", ariaLabel: "prompt" });
  let row = 0;
  for (const group of data.groups) {
    const options = html("optgroup", { label: short(group.name, 60) });
    for (let place = 0; place < group.size; place++, row++) {
      options.append(html("option", { value: String(row), textContent: short(data.prompts[row], 100) || " " }));
    }
    list.append(options);
  }
  list.append(html("option", { value: OWN, textContent: "your own prompt" }));
  const placeholder = "or type a prompt of your own";
  const own = html("input", { type: "text", placeholder, ariaLabel: placeholder, className: "own" });
  const words = html("div", { className: "words", hidden: true });
  const button = html("button", { type: "button", className: "generate", textContent: "Generate" });
  const full = html("div", { className: "prompt", dir: "auto" });
  const status = html("div", { className: "status" });
  status.setAttribute("role", "status");
  const cell = (title) => {
    const text = html("div", { className: "text", dir: "auto" });
    const head = html("div", { className: "head", textContent: title });
    return { head, text, element: html("div", {}, head, text) };
  };
  const unsteered = cell("without steering");
  const steered = cell("steered");
  const texts = html("div", { className: "texts", hidden: true }, unsteered.element, steered.element);
  const decision = html("div", { className: "decision" });
  const top = html("div", { className: "asking" }, list, own, button);
  const element = html("div", { className: "generation" }, top, full, words, status, texts, decision);
  let latest = model.get("answer")?.status === "done" ? model.get("answer") : null; // its texts stay until others come
  let waiting = null; // the timer of a request that the kernel has not taken up yet
  let running = false; // the kernel is at it
  let lost = false; // a request that it did not take up for long
  let again = false; // a control was let go while it was at it
  let marking = null;

  const prompt = () => (list.value === OWN ? own.value : Number(list.value));
  const chosen = () => (list.value === OWN ? null : Number(list.value));

  const asking = () => waiting !== null || running;

  function ask() {
    if (list.value === OWN && !own.value.trim()) return;
    again = asking();
    if (again) return;
    lost = false;
    waiting = setTimeout(() => {
      waiting = null;
      lost = true;
      select();
    }, PATIENCE);
    model.send({ kind: "generate", prompt: prompt(), settings: current() });
    select();
  }

  /** A control was let go, or another prompt chosen: where there are texts, they follow. */
  function follow() {
    if (latest && !lost) ask();
  }

  function taken() {
    clearTimeout(waiting);
    waiting = null;
    lost = false;
    const answer = model.get("answer");
    running = answer.status === "running";
    if (answer.status === "done") latest = answer;
    select();
    if (again && !running) ask();
  }

  /** The reader's own prompt as the kernel read it, while it is the one that is shown. */
  const mine = () => (list.value === OWN && latest?.prompt === own.value ? latest.own : null);

  /** The steered text, its tokens shaded by KL where they make up the text. */
  function shaded() {
    const tokens = latest.tokens ?? [];
    const joined = tokens.map(([token]) => token).join("");
    if (!tokens.length || !joined.startsWith(latest.steered)) return [latest.steered || "(nothing)"];
    const most = Math.max(0.5, ...tokens.map(([, kl]) => kl ?? 0));
    return tokens.map(([token, kl]) => {
      const one = html("span", { textContent: token, title: `KL to the unsteered model: ${told(kl)} nats` });
      if (kl > 0) one.style.background = `rgba(8, 158, 160, ${((0.5 * kl) / most).toFixed(2)})`;
      return one;
    });
  }

  function mark() {
    clearTimeout(marking);
    marking = setTimeout(() => data.marks_words && model.send({ kind: "mark", text: own.value }), 200);
  }

  /** The reader's own prompt with the unknown words marked, and below each what is known instead. */
  function drawWords() {
    const { text, parts = [] } = model.get("words") ?? {};
    const unknown = parts.filter(([, nearest]) => nearest !== null);
    words.hidden = list.value !== OWN || text !== own.value || unknown.length === 0;
    if (words.hidden) return;
    const known = (nearest) => (nearest.length ? `nearest known: ${nearest.join(", ")}` : "nothing like it is known");
    const marked = parts.map(([part, nearest]) =>
      nearest === null ? part : html("u", { textContent: part, title: known(nearest) }),
    );
    const notes = new Map(unknown.map(([part, nearest]) => [part.toLowerCase(), known(nearest)]));
    const lines = [...notes].map(([word, note]) =>
      html("div", { className: "nearest" }, html("u", { textContent: word }), ` is unknown to the model; ${note}`),
    );
    words.replaceChildren(html("div", { dir: "auto" }, ...marked), ...lines);
  }

  function draw() {
    const answer = model.get("answer") ?? {};
    button.disabled = asking() || (list.value === OWN && !own.value.trim());
    button.textContent = asking() ? "Generating…" : "Generate";
    list.classList.toggle("is-own", list.value === OWN);
    full.textContent = list.value === OWN ? "" : data.prompts[chosen()];
    full.hidden = list.value === OWN;
    drawWords();
    const stale = latest && (latest.prompt !== prompt() || relevant(latest.settings) !== relevant(current()));
    const failed = answer.status === "failed" && !asking() && !lost;
    status.className = `status ${failed ? "failed" : ""}`;
    const kept = latest ? " The texts below are from before." : "";
    if (lost) status.textContent = `No answer from the kernel: it is busy, or not running.${kept}`;
    else if (asking()) status.textContent = "The kernel generates both texts…";
    else if (failed) status.textContent = `This failed: ${answer.error}`;
    else if (stale) status.textContent = "Out of date: the controls or the prompt have changed since. Generate again.";
    else status.textContent = "";
    texts.hidden = decision.hidden = !latest;
    texts.classList.toggle("stale", Boolean(stale));
    if (!latest) return;
    unsteered.text.textContent = latest.unsteered || "(nothing)";
    steered.text.replaceChildren(...shaded());
    const what = latest.settings.mode === "ablation" ? "without the subspace" : "steered";
    steered.head.textContent = `${what}; the darker, the further from the unsteered model (KL)`;
    const about = typeof latest.prompt === "string" ? latest.prompt : data.prompts[latest.prompt];
    decision.textContent = `${latest.decision} · ${short(about, 120)}`;
  }

  list.addEventListener("change", () => (select(), follow()));
  own.addEventListener("input", () => {
    list.value = OWN;
    mark();
    select();
  });
  own.addEventListener("keydown", (event) => event.key === "Enter" && ask());
  button.addEventListener("click", ask);
  model.on("change:answer", taken);
  model.on("change:words", drawWords);
  if (typeof latest?.prompt === "string") {
    own.value = latest.prompt;
    list.value = OWN;
  } else if (latest) list.value = String(latest.prompt);
  const stop = () => {
    clearTimeout(waiting);
    clearTimeout(marking);
    model.off("change:answer", taken);
    model.off("change:words", drawWords);
  };
  const pick = (number) => {
    list.value = String(number);
    select();
    follow();
  };
  return { element, draw, chosen, mine, follow, pick, stop };
}

function note(text) {
  return html("div", { className: "note", textContent: text });
}

function render({ model, el }) {
  const data = unpacked(model.get("data"));
  let settings = clone(model.get("settings"));
  let view = null;
  const gated = data.columns > 0;

  function redraw() {
    view = evaluated(data, settings, texts.mine(), view);
    const chosen = texts.chosen();
    controls.draw(settings, view);
    counts.draw(view, settings);
    heatmap.draw(view, settings, chosen);
    if (histogram) histogram.draw(view, settings, chosen);
    if (roc) roc.draw(view, settings);
    texts.draw();
  }
  function change(next) {
    settings = next;
    redraw();
  }
  function release() {
    model.set("settings", clone(settings));
    model.save_changes();
    texts.follow();
  }
  function follow() {
    settings = clone(model.get("settings"));
    redraw();
  }

  const controls = controlPanel(data, change, release);
  const counts = countPanel(data);
  const texts = textPanel(data, { model, current: () => clone(settings), select: () => redraw() });
  const heatmap = heatmapPicture(data, texts.pick);
  const histogram = gated ? histogramPicture(data) : null;
  const roc = gated && data.groups.length > 1 ? rocPicture(data) : null;
  const why = gated ? "One group of prompts: there is no ROC curve." : "No gate: every prompt is steered.";
  const curves = html("div", { className: "curves" });
  curves.append(...[histogram, roc].filter(Boolean).map((picture) => picture.element));
  if (!roc) curves.append(note(why));
  const caption = note("expert weights; faded: not steered, nothing added");
  const map = html("div", { className: "map" }, caption, heatmap.element);
  map.append(...data.fit.map((line) => note(line)));
  const pictures = html("div", { className: "pictures" }, map, curves);
  const side = html("div", { className: "side" }, controls.element, counts.element);
  const root = html(
    "div",
    { className: "fsteer-explorer" },
    html("div", { className: "title", textContent: data.title }),
    texts.element,
    html("div", { className: "lower" }, side, pictures),
  );
  for (const one of root.querySelectorAll("input, select, button")) {
    one.setAttribute("data-lm-suppress-shortcuts", "true"); // else JupyterLab takes its keys; on the root it does not help
  }
  el.append(root);

  redraw();
  const sized = new ResizeObserver(redraw);
  sized.observe(pictures);
  model.on("change:settings", follow);
  return () => {
    sized.disconnect();
    texts.stop();
    model.off("change:settings", follow);
  };
}

export default { render };
