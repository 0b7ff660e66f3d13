// The three pictures. Each `...Picture(data)` makes its element once and gives `draw(view)`. Text is always set as text.

const SVG = "http://www.w3.org/2000/svg";
const BINS = 40;
const FADED = 0.22;
const STRIP = 8; // width of the strip that tells a row's group
const HEAD = 18; // height of the experts' names
const YOURS = 14; // height of the row of the reader's own prompt

function html(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A frame with axes from 0 to 1 and their ticks; `x` and `y` map shares to places. */
function frame(width, height, label, xTitle, yTitle) {
  const box = { left: 46, right: width - 12, top: 10, bottom: height - 42 };
  const x = (share) => box.left + share * (box.right - box.left);
  const y = (share) => box.bottom - share * (box.bottom - box.top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const grid = svg("g", { class: "grid" });
  const ticks = svg("g", { class: "ticks" });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    grid.append(svg("path", { d: `M${x(share)},${box.top}V${box.bottom}M${box.left},${y(share)}H${box.right}` }));
  }
  const below = svg("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xTitle);
  const turned = `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`;
  const beside = svg("text", { transform: turned, "text-anchor": "middle" }, yTitle);
  root.append(grid, ticks, below, beside);
  const tick = (share, text, vertical) =>
    svg(
      "text",
      vertical
        ? { x: box.left - 5, y: y(share) + 4, "text-anchor": "end" }
        : { x: x(share), y: box.bottom + 15, "text-anchor": "middle" },
      text,
    );
  return { root, box, x, y, ticks, tick, below };
}

/** Histogram of the gate's score by group, with the threshold and the selected prompt. */
function histogramPicture(data) {
  const picture = frame(380, 205, `Histogram of the ${data.score}`, data.score, "% of the group");
  const { root, box, x, y, ticks, tick } = picture;
  const bars = data.groups.map((group) => svg("path", { class: "bars", fill: group.colour, stroke: group.colour }));
  const line = svg("path", { class: "threshold" });
  const name = svg("text", { class: "threshold-name", y: box.top + 11 });
  const mark = svg("path", { class: "chosen" });
  root.append(...bars, line, name, mark);
  const [low, high] = data.bounds;
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    picture.root.append(tick(share, String(Number((low + share * (high - low)).toPrecision(3))), false));
  }
  let top = null;

  function draw(view, settings, chosen) {
    picture.below.textContent =
      settings.mode === "ablation"
        ? `share of the activation that is taken out, rank ${settings.rank}`
        : data.ranks
          ? `${data.score} s at rank ${settings.rank}${data.composed ? ", first subspace" : ""}`
          : data.score;
    const shares = histogramOf(data, view.scores, BINS);
    const most = Math.max(...shares.map((one) => Math.max(...one)));
    const scale = [0.1, 0.2, 0.4, 0.6, 0.8].find((limit) => most <= limit) ?? 1;
    if (scale !== top) {
      top = scale;
      ticks.replaceChildren(...[0, 0.5, 1].map((share) => tick(share, String(Math.round(100 * share * top)), true)));
    }
    shares.forEach((one, index) => {
      let path = "";
      one.forEach((share, bin) => {
        if (share > 0) path += `M${x(bin / BINS)},${y(0)}V${y(share / top)}H${x((bin + 1) / BINS)}V${y(0)}Z`;
      });
      bars[index].setAttribute("d", path);
    });
    const cut = settings.mode === "ablation" || !settings.gate ? null : view.threshold;
    const share = cut === null ? 0 : placeOf(data, cut);
    const place = cut === null ? null : x(Math.min(1, Math.max(0, share)));
    line.setAttribute("d", place === null ? "" : `M${place},${box.top}V${box.bottom}`);
    name.textContent = cut === null ? "" : `threshold ${cut.toFixed(3)}`;
    name.setAttribute("x", place === null ? 0 : place + (share > 0.6 ? -5 : 5));
    name.setAttribute("text-anchor", share > 0.6 ? "end" : "start");
    const score = view.own ? view.own.score : chosen === null ? NaN : view.scores[chosen];
    const foot = Number.isFinite(score) ? x(placeOf(data, score)) : null;
    mark.setAttribute("d", foot === null ? "" : `M${foot},${box.bottom}l-5,8h10Z`);
  }
  return { element: root, draw };
}

/** ROC curve of the score, its area, and where the present settings are. */
function rocPicture(data) {
  const first = short(data.groups[0].name, 14);
  const others = data.groups.length > 2 ? "all others" : short(data.groups[1].name, 14);
  const picture = frame(380, 205, "ROC curve", `% of ${others} steered`, `% of ${first} steered`);
  const { root, x, y, ticks, tick } = picture;
  for (const share of [0, 0.5, 1]) ticks.append(tick(share, String(100 * share), false), tick(share, String(100 * share), true));
  const curve = svg("path", { class: "roc" });
  const point = svg("circle", { class: "point", r: 6 });
  const mine = svg("path", { class: "chosen" });
  const area = svg("text", { class: "area", x: x(0.98), y: y(0.06), "text-anchor": "end" });
  root.append(svg("path", { class: "diagonal", d: `M${x(0)},${y(0)}L${x(1)},${y(1)}` }), curve, point, mine, area);

  function draw(view, settings) {
    const points = view.roc ? view.roc.points : [];
    curve.setAttribute("d", points.map(([a, b], index) => `${index ? "L" : "M"}${x(a)},${y(b)}`).join(""));
    area.textContent = view.roc ? `AUROC ${view.roc.area.toFixed(3)}` : "no finite scores";
    const [across, up] = view.ownPoint ?? [];
    mine.setAttribute("d", view.ownPoint ? `M${x(across)},${y(up) - 6}l6,6l-6,6l-6,-6Z` : "");
    const hidden = settings.mode === "ablation" || !view.point;
    point.setAttribute("visibility", hidden ? "hidden" : "visible");
    if (!hidden) {
      point.setAttribute("cx", x(view.point[0]));
      point.setAttribute("cy", y(view.point[1]));
    }
  }
  return { element: root, draw };
}

/** Prompts × experts: a cell's opacity is the expert's weight; rows behind a closed gate are faded. The reader's own
 *  prompt has a row at the foot. */
function heatmapPicture(data, pick) {
  const canvas = html("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Weight of every expert for every prompt");
  const tip = html("div", { className: "tip", hidden: true });
  const element = html("div", { className: "heatmap" }, canvas, tip);
  const k = data.experts.length;
  const gap = data.groups.length > 1 ? 4 : 0;
  const rowHeight = Math.max(1, Math.min(14, Math.floor(380 / data.count)));
  const foot = HEAD + data.count * rowHeight + gap * (data.groups.length - 1) + 4;
  const top = (row) => HEAD + row * rowHeight + gap * data.group[row];
  const state = { view: null, chosen: null };

  function draw(view, settings, chosen) {
    Object.assign(state, { view, settings, chosen });
    const height = foot + (view.own ? YOURS + 2 : 0);
    canvas.style.height = `${height}px`;
    const ink = getComputedStyle(canvas).color;
    const width = canvas.clientWidth || 300;
    const sharp = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * sharp) || canvas.height !== Math.round(height * sharp)) {
      canvas.width = Math.round(width * sharp);
      canvas.height = Math.round(height * sharp);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    const cell = (width - STRIP - 14) / k;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.fillStyle = ink;
    for (let e = 0; e < k; e++) {
      const name = settings.experts[e] ? fitting(pen, data.names[e], String(e), cell - 4) : `${e} off`;
      pen.fillText(name, STRIP + 4 + (e + 0.5) * cell, 12);
    }
    const cells = (y, tall, weights, shown) => {
      weights.forEach((weight, e) => {
        if (!(weight > 0)) return; // 0 and NaN are left empty
        pen.globalAlpha = weight * shown;
        pen.fillStyle = data.experts[e];
        pen.fillRect(STRIP + 4 + e * cell, y, cell - 1, tall);
      });
      pen.globalAlpha = 1;
    };
    const thick = rowHeight > 3 ? rowHeight - 1 : rowHeight;
    for (let row = 0; row < data.count; row++) {
      const y = top(row);
      pen.fillStyle = data.groups[data.group[row]].colour;
      pen.fillRect(0, y, STRIP - 2, rowHeight);
      cells(y, thick, view.weights.subarray(row * k, (row + 1) * k), view.open[row] ? 1 : FADED);
    }
    pen.fillStyle = ink;
    if (view.own) {
      pen.fillRect(0, foot, STRIP - 2, YOURS);
      cells(foot, YOURS, view.own.weights, view.own.open ? 1 : FADED);
    }
    pen.fillStyle = ink;
    if (chosen !== null || view.own) {
      const middle = chosen === null ? foot + YOURS / 2 : top(chosen) + rowHeight / 2;
      pen.beginPath();
      pen.moveTo(width - 9, middle);
      pen.lineTo(width - 1, middle - 5);
      pen.lineTo(width - 1, middle + 5);
      pen.fill();
    }
  }

  function rowAt(event) {
    const y = event.clientY - canvas.getBoundingClientRect().top;
    for (let row = 0; row < data.count; row++) if (y >= top(row) && y < top(row) + rowHeight) return row;
    return null;
  }

  function tell(event) {
    const row = state.view ? rowAt(event) : null;
    tip.hidden = row === null;
    if (row === null) return;
    const { view, settings } = state;
    const weights = settings.experts.map((on, e) => `${data.names[e]}: ${on ? told(view.weights[row * k + e]) : "off"}`);
    const ratio = view.scores ? `${data.score} ${told(view.scores[row], 3)}, ` : "";
    const gate = settings.mode === "ablation" ? "not steered" : view.open[row] ? "steered" : "left alone";
    const lines = [data.prompts[row].slice(0, 300), `${ratio}${gate}`, `weights ${weights.join("  ")}`];
    tip.replaceChildren(...lines.map((line) => html("div", { textContent: line })));
    const box = element.getBoundingClientRect();
    const [across, down] = [event.clientX - box.left, event.clientY - box.top];
    tip.style.top = `${down + 16}px`;
    tip.style.left = `${Math.max(0, Math.min(across, box.width - tip.offsetWidth))}px`;
  }

  canvas.addEventListener("mousemove", tell);
  canvas.addEventListener("mouseleave", () => (tip.hidden = true));
  canvas.addEventListener("click", (event) => {
    const row = rowAt(event);
    if (row !== null) pick(row);
  });
  return { element, draw };
}

/** The name where there is room for it, else the number. */
function fitting(pen, name, number, room) {
  return pen.measureText(name).width <= room ? name : number;
}

function told(value, digits = 2) {
  return Number.isFinite(value) ? value.toFixed(digits) : "unknown";
}

function short(text, most) {
  const letters = [...text];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}
