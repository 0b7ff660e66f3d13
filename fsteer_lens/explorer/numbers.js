// What the controls amount to, in numbers; no drawing and no page. First of the three parts of the widget's module.

/** The kernel's data with its bytes as typed arrays; rows are prompts. */
function unpacked(data) {
  const count = data.prompts.length;
  const group = new Uint16Array(count);
  let row = 0;
  data.groups.forEach((one, index) => {
    group.fill(index, row, (row += one.size));
  });
  return {
    ...data,
    count,
    group,
    scores: new Float32Array(bytes(data.scores)),
    opened: new Uint8Array(bytes(data.opened)),
    logits: new Float32Array(bytes(data.logits)),
  };
}

/** A copy of the bytes of a DataView: typed arrays have to start at multiples of their element's size. */
function bytes(view) {
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

/** The threshold that holds: the chosen one, else the rank's own; null where there is none. */
function thresholdOf(data, settings) {
  if (settings.threshold !== null) return settings.threshold;
  return data.thresholds ? data.thresholds[columnOf(settings)] : null;
}

/** Which column of the scores counts: that of the chosen rank, or the only one of a gate without ranks. */
function columnOf(settings) {
  return (settings.rank ?? 1) - 1;
}

/** Score of every prompt at the chosen rank, NaN where it is not known; null without a gate. */
function scoresOf(data, settings) {
  if (!data.columns) return null;
  const scores = new Float32Array(data.count);
  for (let row = 0; row < data.count; row++) scores[row] = data.scores[row * data.columns + columnOf(settings)];
  return scores;
}

/** 1 for every prompt that is steered. */
function openOf(data, settings, scores) {
  const open = new Uint8Array(data.count);
  if (settings.mode === "ablation") return open;
  if (!scores || !settings.gate) return open.fill(1);
  const cut = settings.threshold === null ? null : Math.fround(settings.threshold); // the kernel compares in float32
  for (let row = 0; row < data.count; row++) {
    const beyond = data.opens_above ? scores[row] >= cut : scores[row] < cut;
    open[row] = cut === null ? data.opened[row * data.columns + columnOf(settings)] : Number(beyond);
  }
  return open;
}

/** Weight of every expert for every prompt: softmax over those that are on; NaN where a logit is none. */
function weightsOf(data, on) {
  const k = on.length;
  const weights = new Float32Array(data.count * k);
  for (let row = 0; row < data.count; row++) {
    let most = -Infinity;
    for (let e = 0; e < k; e++) if (on[e]) most = Math.max(most, data.logits[row * k + e]);
    let sum = 0;
    for (let e = 0; e < k; e++) {
      if (on[e]) sum += weights[row * k + e] = Math.exp(data.logits[row * k + e] - most);
    }
    for (let e = 0; e < k; e++) weights[row * k + e] /= sum;
  }
  return weights;
}

/** How many of every group are steered. */
function countsOf(data, open) {
  const counts = data.groups.map(() => 0);
  open.forEach((one, row) => (counts[data.group[row]] += one));
  return counts;
}

/** Where a score lies between the ends of its axis, 0 to 1. */
function placeOf(data, score) {
  const [low, high] = data.bounds;
  return (score - low) / (high - low);
}

/** Share of each group's prompts in each of `bins` equal bins of the axis; one that is not finite is in none. */
function histogramOf(data, scores, bins) {
  const shares = data.groups.map(() => new Float64Array(bins));
  scores.forEach((score, row) => {
    const bin = Math.max(0, Math.min(bins - 1, Math.floor(placeOf(data, score) * bins)));
    if (Number.isFinite(score)) shares[data.group[row]][bin] += 1;
  });
  return shares.map((one, index) => one.map((n) => n / data.groups[index].size));
}

/** Points (false alarms, hits) from (0, 0) to (1, 1) and the area under them; the first group is to be hit.
 *  Equal scores move along a diagonal, so a tie counts as half. Null where a side has no finite score. */
function rocOf(data, scores) {
  const rows = [...scores.keys()].filter((row) => Number.isFinite(scores[row]));
  const positives = rows.filter((row) => data.group[row] === 0).length;
  const negatives = rows.length - positives;
  if (!positives || !negatives) return null;
  rows.sort((a, b) => (data.opens_above ? scores[b] - scores[a] : scores[a] - scores[b]));
  const points = [[0, 0]];
  let hits = 0, alarms = 0, area = 0;
  rows.forEach((row, place) => {
    data.group[row] === 0 ? (hits += 1) : (alarms += 1);
    if (place + 1 < rows.length && scores[rows[place + 1]] === scores[row]) return;
    const point = [alarms / negatives, hits / positives];
    const last = points[points.length - 1];
    area += ((point[0] - last[0]) * (point[1] + last[1])) / 2;
    points.push(point);
  });
  return { points, area };
}

/** Where the present settings lie in the ROC picture: share of the others, and of the first group, that is steered. */
function operatingPoint(data, counts) {
  const others = counts.slice(1).reduce((sum, n) => sum + n, 0);
  const size = data.count - data.groups[0].size;
  return size ? [others / size, counts[0] / data.groups[0].size] : null;
}

/** Where a threshold at this score would lie in the ROC picture; null where it is not known. */
function pointAt(data, scores, score) {
  if (!scores || !Number.isFinite(score)) return null;
  const beyond = scores.map((one) => (data.opens_above ? one >= score : one <= score));
  return operatingPoint(data, countsOf(data, beyond));
}

/** Everything that is drawn; `own` is the reader's own prompt, `former` is what was drawn last, whose weights are kept while the switches are the same. */
function evaluated(data, settings, own, former) {
  const key = String(settings.experts);
  const scores = scoresOf(data, settings);
  const open = openOf(data, settings, scores);
  const counts = countsOf(data, open);
  const mine = ownOf(data, settings, own);
  return {
    key,
    own: mine,
    ownPoint: mine && pointAt(data, scores, mine.score),
    scores,
    open,
    counts,
    weights: former && former.key === key ? former.weights : weightsOf(data, settings.experts),
    threshold: thresholdOf(data, settings),
    roc: scores && data.groups.length > 1 ? rocOf(data, scores) : null,
    point: operatingPoint(data, counts),
  };
}

/** Score, decision and weights of the reader's own prompt, as the kernel read it; null where it has not. */
function ownOf(data, settings, own) {
  if (!own) return null;
  const known = (values) => Float32Array.from(values, (value) => value ?? NaN);
  const one = { ...data, count: 1, scores: known(own.scores), opened: own.opened, logits: known(own.logits) };
  const scores = scoresOf(one, settings);
  return {
    score: scores ? scores[0] : NaN,
    open: openOf(one, settings, scores)[0],
    weights: weightsOf(one, settings.experts),
  };
}

/** What of the settings a generated text depends on; texts are out of date when this has changed. */
function relevant(settings) {
  const { rank, threshold, strength, experts, residual, gate, mode } = settings;
  if (mode === "ablation") return JSON.stringify([mode, rank]);
  return JSON.stringify([mode, gate, gate ? [rank, threshold] : null, strength, experts, residual]);
}
