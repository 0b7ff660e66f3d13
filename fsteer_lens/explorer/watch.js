// The widget of `watch`: what to ask, the text while it comes, and below it the replay, whose own script draws it.
const PATIENCE = 4000;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function slider(name, value, least, most, step) {
  const input = element("input", { type: "range", min: least, max: most, step, value });
  const told = element("output", {}, String(value));
  input.addEventListener("input", () => { told.textContent = input.value; });
  return [element("label", {}, element("span", {}, `${name} `, told), input), input];
}

function render({ model, el }) {
  const start = model.get("start");
  const prompt = element("textarea", { rows: 1 });
  prompt.value = start.prompt;
  const [strengthLabel, strength] = slider("strength", start.strength, 0, start.most, 0.05);
  const [rankLabel, rank] = slider("rank", start.rank, 1, Math.max(start.ranks, 1), 1);
  const generate = element("button", { type: "button" }, "Generate");
  const stop = element("button", { type: "button", disabled: "" }, "Stop");
  const live = element("p", { class: "live", "aria-live": "polite", dir: "auto" });
  const view = element("div", { class: "view" });
  let waiting = null;

  generate.addEventListener("click", () => {
    generate.disabled = true;
    live.textContent = "asked …";
    waiting = setTimeout(() => {
      generate.disabled = false;
      live.textContent = "No kernel answers: run this cell to generate. What was shown before stays below.";
    }, PATIENCE);
    const asked = { kind: "generate", prompt: prompt.value, strength: Number(strength.value) };
    model.send({ ...asked, rank: start.ranks ? Number(rank.value) : null });
  });
  stop.addEventListener("click", () => model.send({ kind: "stop" }));

  function follow() {
    const { status, text } = model.get("live");
    clearTimeout(waiting);
    generate.disabled = status === "running";
    stop.disabled = status !== "running";
    live.textContent = status === "running" || status === "failed" ? text : "";
  }

  // A script that comes as markup is not run: it is made anew, and draws every replay that has not begun.
  function show() {
    view.innerHTML = model.get("view");
    for (const old of view.querySelectorAll("script:not([type])")) {
      old.replaceWith(element("script", {}, old.textContent));
    }
  }

  const asked = element("div", { class: "asked" }, element("label", { class: "prompt" }, "prompt", prompt), strengthLabel);
  if (start.ranks) asked.append(rankLabel);
  asked.append(generate, stop);
  el.classList.add("fsteer-watch");
  el.replaceChildren(asked, live, view);
  model.on("change:live", follow);
  model.on("change:view", show);
  follow();
  show();
  return () => { clearTimeout(waiting); model.off("change:live", follow); model.off("change:view", show); };
}

export default { render };
