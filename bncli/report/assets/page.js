// The figures, tables and controls of a report: draws what #data holds, and asks for nothing from outside.
// Text from the data only ever becomes text: textContent, or a value in a figure's data.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector, root = document) => root.querySelector(selector);

// ---------------------------------------------------------------- numbers and words

const asNumber = value => (value === null ? NaN : Number(value)); // also of the words NaN and Infinity

function short(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const number = Number(value);
  if (Number.isNaN(number)) return typeof value === "number" || value === "NaN" ? "NaN" : String(value);
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  const size = Math.abs(number);
  const text =
    number === 0 ? "0"
    : size >= 1e6 || size < 1e-3 ? number.toExponential(digits - 2)
    : Number.isInteger(number) ? number.toLocaleString("en")
    : String(Number(number.toPrecision(digits)));
  return text.replaceAll("-", "−");
}

const percent = fraction => (fraction === null ? "–" : `${(100 * fraction).toFixed(2)} %`);
// as a sentence begins, except with the name of a tensor
const capitalised = text => (text.split(" ", 1)[0].includes("_") ? text : text[0].toUpperCase() + text.slice(1));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------- drawing

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif';
const onPaper = { printing: false };

// SVG takes the page's colours by name, and follows them; a canvas needs them as they are now
function palette(renderer) {
  const names = ["ink", "soft", "line", "grid", "one", "two", "three", "mark", "card"];
  if (renderer === "svg") return Object.fromEntries(names.map(name => [name, `var(--${name})`]));
  if (onPaper.printing) {
    return { ink: "#000", soft: "#444", line: "#bbb", grid: "#e4e4e4", one: "#0067a8", two: "#b84a00", three: "#00694b", mark: "#b3261e", card: "#fff" };
  }
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(names.map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function config(colours) {
  const text = { labelColor: colours.soft, titleColor: colours.soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
  return {
    background: null,
    font: FONT,
    view: { stroke: null },
    axis: { ...text, domainColor: colours.line, tickColor: colours.line, gridColor: colours.grid, labelOverlap: true },
    legend: { ...text, orient: "top", title: null, symbolStrokeWidth: 3, labelLimit: 0 },
    header: { ...text },
    text: { fill: colours.ink, color: colours.ink, fontSize: 12 },
    line: { strokeWidth: 2.2 },
    rule: { stroke: colours.soft },
  };
}

const drawn = new Map(); // the last view of each place, and how to draw it again

async function draw(place, build, { renderer = "svg", label } = {}) {
  const width = Math.max(160, place.clientWidth - 2 * parseFloat(getComputedStyle(place).paddingLeft || 0));
  const colours = palette(renderer);
  const spec = build(width, colours);
  const before = drawn.get(place);
  const caption = find("figcaption", place);
  const host = element("div");
  const embedded = await window.vegaEmbed(
    host,
    { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec, config: config(colours) },
    // ast: expressions are interpreted, so that no text can ever become code
    { ast: true, renderer, actions: false, mode: "vega-lite", tooltip: { theme: "custom", disableDefaultStyle: false } },
  );
  if (drawn.get(place) !== before) return embedded.view.finalize(); // overtaken by a later call
  before?.view.finalize();
  place.replaceChildren(...(caption ? [caption] : []), host);
  const words = label ?? place.dataset.label ?? "";
  const picture = find("svg, canvas", host);
  if (picture) {
    for (const inner of picture.querySelectorAll("[role], [aria-label], [aria-roledescription]")) {
      for (const name of ["role", "aria-label", "aria-roledescription", "aria-hidden"]) inner.removeAttribute(name);
    }
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", words);
    picture.removeAttribute("tabindex");
  }
  for (const wrapper of host.querySelectorAll("[role='graphics-document'], [aria-roledescription]")) {
    wrapper.removeAttribute("role");
    wrapper.removeAttribute("aria-roledescription");
  }
  drawn.set(place, { view: embedded.view, width: place.clientWidth, again: () => draw(place, build, { renderer, label }), renderer });
  return embedded.view;
}

const waiting = new Map(); // places that are not on the screen yet
const watcher = new IntersectionObserver(
  entries => entries.filter(entry => entry.isIntersecting).forEach(entry => drawNow(entry.target)),
  { rootMargin: "600px" },
);

function whenSeen(place, task) {
  waiting.set(place, task);
  watcher.observe(place);
}

function drawNow(place) {
  const task = waiting.get(place);
  waiting.delete(place);
  watcher.unobserve(place);
  task?.();
}

// what is drawn and still in the page, again; only canvases need it where the colours change
function redraw(wanted = () => true) {
  for (const [place, entry] of [...drawn]) {
    if (!place.isConnected) {
      entry.view.finalize();
      drawn.delete(place);
    } else if (wanted(place, entry)) entry.again();
  }
}

let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => redraw((place, entry) => place.clientWidth !== entry.width), 150);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw((_, entry) => entry.renderer === "canvas"));
addEventListener("beforeprint", () => {
  onPaper.printing = true;
  // what is drawn may bring more places
  while (waiting.size) for (const place of [...waiting.keys()]) drawNow(place);
  redraw((_, entry) => entry.renderer === "canvas");
});
addEventListener("afterprint", () => {
  onPaper.printing = false;
  redraw((_, entry) => entry.renderer === "canvas");
});

// ---------------------------------------------------------------- tables

// columns: [title, row => text]; a first column is the row's header
function fill(place, caption, columns, rows, { flagged = () => false, onSort } = {}) {
  const head = element("tr", {}, ...columns.map(([title]) => element("th", { scope: "col" }, title)));
  const body = rows.map(row => {
    const cells = columns.map(([, text], at) => {
      const content = text(row);
      return at === 0 ? element("th", { scope: "row" }, content) : element("td", {}, content);
    });
    return element("tr", { class: flagged(row) ? "flagged" : undefined }, ...cells);
  });
  const table = element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
  place.replaceChildren(table);
}

// a table that is wider than the screen is reached by keyboard, so that it can be scrolled
const tables = new ResizeObserver(entries => {
  for (const { target: place } of entries) {
    if (place.classList.contains("tall")) continue; // is reached always
    const scrolls = place.scrollWidth > place.clientWidth;
    const values = { tabindex: "0", role: "region", "aria-label": find("caption", place)?.textContent ?? "Table" };
    for (const [name, value] of Object.entries(values)) scrolls ? place.setAttribute(name, value) : place.removeAttribute(name);
  }
});

function lazily(place, make) {
  const details = place.closest("details");
  if (!details) return make();
  let made = false;
  const once = () => {
    if (!made) make();
    made = true;
  };
  details.addEventListener("toggle", () => details.open && once());
  addEventListener("beforeprint", () => details.open && once());
}

// ---------------------------------------------------------------- accuracy by batch size

// of an axis with values of any size: Vega's own formats write 400 as 4e+2
const written = value => `${value} != 0 && (abs(${value}) >= 1e6 || abs(${value}) < 1e-4) ? format(${value}, '.2~e') : format(${value}, ',.6~f')`;
const NUMBERS = { labelExpr: written("datum.value") };
const MODES = ["eval mode", "batch statistics"];

function sweepFigure(place) {
  const rows = data.sweep.flatMap(point => [
    { size: point.batch_size, mode: MODES[0], value: point.eval_accuracy, low: point.eval_interval[0], high: point.eval_interval[1] },
    ...(point.batch_statistics_accuracy === null ? [] : [
      { size: point.batch_size, mode: MODES[1], value: point.batch_statistics_accuracy, low: point.batch_statistics_interval[0], high: point.batch_statistics_interval[1] },
    ]),
  ]);
  const sizes = data.sweep.map(point => point.batch_size);
  draw(place, (width, colours) => {
    const shared = {
      x: { field: "size", type: "quantitative", scale: { type: "log", base: 2, nice: false }, axis: { values: sizes, grid: false, format: "d", title: "images in a batch" } },
      color: { field: "mode", type: "nominal", legend: null, scale: { domain: MODES, range: [colours.one, colours.two] } },
    };
    return {
      width, height: 260, autosize: { type: "fit", contains: "padding" },
      data: { values: rows },
      layer: [
        { mark: { type: "area", opacity: 0.18 }, encoding: { ...shared, y: { field: "low", type: "quantitative", axis: { format: ".0%", title: "test accuracy", tickCount: 5 }, scale: { domain: [0, 1] } }, y2: { field: "high" } } },
        { mark: { type: "line" }, encoding: { ...shared, y: { field: "value", type: "quantitative" }, strokeDash: { field: "mode", type: "nominal", legend: null, scale: { domain: MODES, range: [[1, 0], [7, 4]] } } } },
        { mark: { type: "point", filled: true, size: 55, opacity: 1 }, encoding: { ...shared, y: { field: "value", type: "quantitative" }, shape: { field: "mode", type: "nominal", legend: null, scale: { domain: MODES, range: ["circle", "square"] } }, tooltip: [{ field: "size", title: "images in a batch" }, { field: "mode" }, { field: "value", format: ".2%", title: "accuracy" }] } },
      ],
    };
  });
}

// ---------------------------------------------------------------- the gap

function scoresFigure(place) {
  const scores = data.gap.scores.map((score, at) => ({ ...score, inUse: at === 0 }));
  draw(place, (width, colours) => ({
    width, height: (width < 500 ? 40 : 34) * scores.length, autosize: { type: "fit-x", contains: "padding" },
    data: { values: scores },
    encoding: {
      y: { field: "name", type: "nominal", sort: null, axis: { title: null, labelLimit: 0, labelExpr: width < 500 ? "split(datum.label, ', ')" : "datum.label", ticks: false, domain: false } },
      x: { field: "accuracy", type: "quantitative", scale: { domain: [0, 1] }, axis: { format: ".0%", title: "test accuracy", tickCount: 5 } },
    },
    layer: [
      { mark: { type: "bar", height: 16 }, encoding: { tooltip: [{ field: "name", title: "statistics" }, { field: "accuracy", format: ".2%" }], color: { condition: { test: "datum.inUse", value: colours.two }, value: colours.one } } },
      { mark: { type: "text", align: "right", dx: -6, color: colours.card, fontWeight: 600 }, transform: [{ filter: "datum.accuracy > 0.2" }], encoding: { text: { field: "accuracy", format: ".1%" } } },
      { mark: { type: "text", align: "left", dx: 5 }, transform: [{ filter: "datum.accuracy <= 0.2" }], encoding: { text: { field: "accuracy", format: ".1%" } } },
    ],
  }));
}

const MAX_BARS = 40;

// what is written beside a layer's bar
function repairOf({ name, score, recovered }) {
  const sign = recovered >= 0 ? "+" : "−";
  const repair = recovered === null ? "" : `repair ${sign}${Math.abs(100 * recovered).toFixed(1)} points${name === data.gap.worst ? " ◀" : ""}`;
  return [Number.isFinite(score) ? "" : "NaN or infinite", repair].filter(Boolean).join(": ");
}

function guiltFigure(place) {
  const all = data.gap.layers.map((layer, index) => ({ ...layer, index, score: asNumber(layer.score) }));
  const far = row => (Number.isNaN(row.score) ? Infinity : row.score);
  const rows = [...all].sort((a, b) => (b.name === data.gap.worst) - (a.name === data.gap.worst) || (far(b) > far(a)) - (far(b) < far(a))).slice(0, MAX_BARS);
  rows.sort((a, b) => a.index - b.index);
  const farthest = largestOf(rows.map(row => row.score).filter(Number.isFinite));
  const room = width => Math.max(40, width - Math.min(Math.max(110, width / 3), 7 * largestOf(rows.map(row => row.name.length))));
  draw(place, (width, colours) => ({
    width, height: 24 * rows.length, autosize: { type: "fit-x", contains: "padding" },
    data: { values: rows.map(row => ({ ...row, score: Number.isFinite(row.score) ? row.score : 0, guilty: row.name === data.gap.worst, gain: repairOf(row) })) },
    encoding: { y: { field: "name", type: "nominal", sort: null, axis: { title: null, labelLimit: Math.max(110, width / 3), ticks: false, domain: false } } },
    layer: [
      { mark: { type: "bar", height: 13 }, encoding: { x: { field: "score", type: "quantitative", axis: { title: "distance, in standard deviations", tickCount: 5, ...NUMBERS }, scale: { domain: [0, (farthest > 0 ? farthest : 1) * (1 + 140 / Math.max(30, room(width) - 140))], nice: false } }, color: { condition: { test: "datum.guilty", value: colours.two }, value: colours.one }, tooltip: [{ field: "name", title: "layer" }, { field: "score", format: ".3g", title: "distance" }, { field: "gain", title: "alone" }] } },
      { mark: { type: "text", align: "left", dx: 5 }, encoding: { x: { field: "score", type: "quantitative" }, text: { field: "gain" } } },
    ],
  }), { label: `Bar chart of ${rows.length} layers${data.gap.worst ? `; ${data.gap.worst} is to blame` : ""}. The numbers are in the table below.` });
}

function guiltTable(place) {
  fill(place, "Each layer’s running statistics against its input", [
    ["Layer", row => row.name], ["Distance", row => short(row.score)], ["running_mean is off, in standard deviations", row => short(row.shift)],
    ["running_var ÷ variance", row => short(row.ratio)], ["Repaired alone", row => (row.recovered === null ? "not tried" : `${short(100 * row.recovered)} points`)],
  ], data.gap.layers, { flagged: row => row.name === data.gap.worst });
}

// ---------------------------------------------------------------- training and history

const transposed = columns => (Object.values(columns)[0] ?? []).map((_, at) => Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[at]])));

function trainingFigure(place) {
  const epochs = transposed(data.training);
  const series = ["test", "training"];
  const rows = epochs.flatMap(epoch => [
    { epoch: epoch.epoch, series: series[0], value: epoch.test_accuracy },
    { epoch: epoch.epoch, series: series[1], value: epoch.train_accuracy },
  ]).filter(row => row.value !== null);
  draw(place, (width, colours) => ({
    width, height: 240, autosize: { type: "fit", contains: "padding" },
    data: { values: rows },
    encoding: {
      x: { field: "epoch", type: "quantitative", axis: { tickMinStep: 1, grid: false, title: "epoch", format: "d" }, scale: { nice: false, zero: false } },
      y: { field: "value", type: "quantitative", axis: { format: ".0%", title: "accuracy", tickCount: 5 }, scale: { zero: true } },
      color: { field: "series", type: "nominal", legend: null, scale: { domain: series, range: [colours.one, colours.two] } },
      strokeDash: { field: "series", type: "nominal", legend: null, scale: { domain: series, range: [[1, 0], [7, 4]] } },
    },
    layer: [
      { mark: "line" },
      { mark: { type: "point", filled: true, opacity: 1, size: 45 }, encoding: { tooltip: [{ field: "epoch" }, { field: "series" }, { field: "value", format: ".2%" }] } },
    ],
  }));
}

function trainingTable(place) {
  fill(place, "Each epoch", [
    ["Epoch", row => short(row.epoch)], ["Training loss", row => short(row.train_loss)], ["Training accuracy", row => percent(row.train_accuracy)],
    ["Test loss", row => short(row.test_loss)], ["Test accuracy", row => percent(row.test_accuracy)], ["Learning rate", row => short(row.learning_rate)],
  ], transposed(data.training));
}

const MAX_MULTIPLES = 48;

function distanceRows(layer) {
  return layer.epoch.flatMap((epoch, at) => [
    { epoch, what: "mean", value: layer.shift[at] },
    { epoch, what: "variance", value: layer.ratio[at] === null || layer.ratio[at] <= 0 ? null : Math.abs(Math.log(layer.ratio[at])) },
  ]).filter(row => row.value !== null && Number.isFinite(row.value));
}

function historyFigures(place) {
  const layers = data.history.map((layer, index) => ({ layer, index, rows: distanceRows(layer) }));
  const largest = ({ rows }) => Math.max(0, ...rows.slice(-2).map(row => row.value));
  const shown = [...layers].sort((a, b) => largest(b) - largest(a)).slice(0, MAX_MULTIPLES).sort((a, b) => a.index - b.index);
  const top = Math.max(0.1, ...shown.flatMap(({ rows }) => rows.map(row => row.value)));
  for (const { layer, rows } of shown) {
    const figure = element("figure", {}, element("figcaption", { title: layer.name }, layer.name));
    place.append(figure);
    whenSeen(figure, () => draw(figure, (width, colours) => ({
      width, height: 105, autosize: { type: "fit", contains: "padding" },
      data: { values: rows },
      mark: { type: "line", point: { size: 22, opacity: 1 } },
      encoding: {
        x: { field: "epoch", type: "quantitative", axis: { title: "epoch", tickMinStep: 1, tickCount: 4, grid: false, format: "d" }, scale: { zero: false, nice: false } },
        y: { field: "value", type: "quantitative", axis: { title: null, tickCount: 3, ...NUMBERS }, scale: { domain: [0, top] } },
        color: { field: "what", type: "nominal", legend: null, scale: { domain: ["mean", "variance"], range: [colours.one, colours.two] } },
        strokeDash: { field: "what", type: "nominal", legend: null, scale: { domain: ["mean", "variance"], range: [[1, 0], [5, 3]] } },
        tooltip: [{ field: "epoch" }, { field: "what" }, { field: "value", format: ".3g", title: "distance" }],
      },
    }), { label: `${layer.name}: distance of running from batch statistics by epoch; at the end ${short(layer.shift.at(-1))} for the mean, variance ratio ${short(layer.ratio.at(-1))}.` }));
  }
  if (shown.length < layers.length) place.append(element("p", { class: "note" }, `${shown.length} of ${layers.length} layers: those that are farthest at the end. The table has all.`));
}

function historyTable(place) {
  const rows = data.history.flatMap(layer => layer.epoch.map((epoch, at) => ({ name: layer.name, epoch, shift: layer.shift[at], ratio: layer.ratio[at] })));
  fill(place, "Running statistics against the epoch’s batches", [
    ["Layer", row => row.name], ["Epoch", row => short(row.epoch)], ["running_mean is off, in standard deviations", row => short(row.shift)], ["running_var ÷ variance", row => short(row.ratio)],
  ], rows.slice(0, 5000));
}

// ---------------------------------------------------------------- two checkpoints

function comparisonFigure(place) {
  const all = transposed(data.comparison).map((row, index) => ({ ...row, index }));
  const rows = [...all].sort((a, b) => asNumber(b.kl) - asNumber(a.kl)).slice(0, MAX_BARS).sort((a, b) => a.index - b.index);
  const kinds = ["statistics alone", "statistics and weights", "unchanged"];
  const kind = row => (row.statistics ? (row.weights ? kinds[1] : kinds[0]) : kinds[2]);
  draw(place, (width, colours) => ({
    width, height: 24 * rows.length, autosize: { type: "fit-x", contains: "padding" },
    data: { values: rows.map(row => ({ ...row, kind: kind(row) })) },
    mark: { type: "bar", height: 13 },
    encoding: {
      y: { field: "name", type: "nominal", sort: null, axis: { title: null, labelLimit: Math.max(110, width / 3), ticks: false, domain: false } },
      x: { field: "kl", type: "quantitative", axis: { title: "KL divergence of the layer’s channels, mean (nats)", tickCount: 5, ...NUMBERS } },
      color: { field: "kind", type: "nominal", scale: { domain: kinds, range: [colours.two, colours.one, colours.soft] } },
      tooltip: [{ field: "name", title: "layer" }, { field: "kl", format: ".3g" }, { field: "shift", format: ".3g", title: "mean shift" }, { field: "ratio", format: ".3g", title: "variance ratio" }, { field: "kind", title: "what moved" }],
    },
  }));
}

function comparisonTable(place) {
  fill(place, "Running statistics of the second checkpoint against the first’s", [
    ["Layer", row => row.name], ["KL divergence", row => short(row.kl)], ["running_mean moved, in standard deviations", row => short(row.shift)],
    ["running_var, second ÷ first", row => short(row.ratio)], ["Farthest channel", row => short(row.channel)], ["Weights", row => (row.weights ? "moved" : "same")],
  ], transposed(data.comparison));
}

// ---------------------------------------------------------------- channels

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

const layers = data.layers;
const numLayers = layers.name.length;
const channels = {};
const firstOf = new Map(); // of each layer in the page, where its channels begin
const epsOf = new Map();

function readChannels() {
  for (const name of ["running_mean", "running_var", "weight", "bias"]) channels[name] = unpack(data.channels[name]);
  let first = 0;
  data.channels.layers.forEach((layer, at) => {
    firstOf.set(layer, first);
    epsOf.set(layer, data.channels.eps[at]);
    first += layers.channels[layer];
  });
}

function channelOf(layer, number) {
  const at = firstOf.get(layer) + number;
  const mean = channels.running_mean[at];
  const variance = channels.running_var[at];
  const weight = channels.weight[at];
  return {
    number, running_mean: mean, running_var: variance, weight, bias: channels.bias[at],
    gain: Math.abs(weight) / Math.sqrt(variance + epsOf.get(layer)), deviations: mean / Math.sqrt(variance),
  };
}

const channelsOf = layer => Array.from({ length: layers.channels[layer] }, (_, number) => channelOf(layer, number));

// Math.max takes no more arguments than the stack holds
const largestOf = values => values.reduce((most, value) => (value > most ? value : most), -Infinity);

const STRIPS = [
  ["running_mean", "running_mean", false], ["running_var", "running_var", true],
  ["weight", "weight", false], ["gain", "gain: |weight| ÷ √(running_var + eps)", true],
];
const WIDE = 30; // largest over smallest from which a log scale reads better

// some four, for the axis of a log scale
function powersOfTen(sizes) {
  const [low, high] = [Math.floor(Math.log10(-largestOf(sizes.map(size => -size)))), Math.ceil(Math.log10(largestOf(sizes)))];
  const step = Math.max(1, Math.ceil((high - low) / 4));
  return Array.from({ length: Math.floor((high - low) / step) + 1 }, (_, at) => 10 ** (low + at * step));
}

// four charts of a layer's channels; `marked` are found by a rule, `chosen` is pointed at
function drawStrips(place, layer, marked = [], chosen = null) {
  if (!firstOf.has(layer)) {
    place.replaceChildren(element("p", { class: "note" }, "This layer’s channels are not in the page; --layer with its name puts them in."));
    return;
  }
  const isMarked = new Set(marked);
  const all = channelsOf(layer);
  while (place.children.length !== STRIPS.length || place.firstElementChild?.tagName !== "FIGURE") {
    place.replaceChildren(...STRIPS.map(([, title]) => element("figure", {}, element("figcaption", {}, title))));
  }
  STRIPS.forEach(([name, quantity, mayBeLog], at) => {
    const sizes = mayBeLog ? all.map(one => one[name]).filter(size => Number.isFinite(size) && size > 0) : [];
    const isLog = sizes.length > 0 && largestOf(sizes) / -largestOf(sizes.map(size => -size)) > WIDE;
    const title = `${quantity}${isLog ? " (log scale)" : ""}`;
    find("figcaption", place.children[at]).textContent = title;
    const ticks = isLog ? { values: powersOfTen(sizes) } : { tickCount: 4 };
    const usable = all.filter(one => Number.isFinite(one[name]) && (!isLog || one[name] > 0));
    const broken = all.filter(one => !usable.includes(one));
    const scale = isLog ? { type: "log", nice: true } : { zero: false, nice: true };
    const kinds = ["other channels", "found", "chosen"];
    const rows = usable.map(one => ({ number: one.number, value: one[name], kind: one.number === chosen ? kinds[2] : isMarked.has(one.number) ? kinds[1] : kinds[0] }));
    const words = broken.length ? `${plural(broken.length, "channel")} not drawn (NaN, infinite${isLog ? ", or not positive on a log scale" : ""}): ${broken.slice(0, 8).map(one => one.number).join(", ")}${broken.length > 8 ? ", …" : ""}.` : "";
    draw(place.children[at], (width, colours) => ({
      width, height: 110, autosize: { type: "fit", contains: "padding" },
      layer: [
        {
          data: { values: rows },
          mark: { type: "point", filled: true, opacity: 0.85 },
          encoding: {
            x: { field: "number", type: "quantitative", axis: { title: "channel", grid: false, tickCount: 5, format: "d" }, scale: { domain: [-0.5, Math.max(0.5, all.length - 0.5)], nice: false } },
            y: { field: "value", type: "quantitative", axis: { title: null, ...ticks, ...NUMBERS }, scale },
            color: { field: "kind", type: "nominal", legend: null, scale: { domain: kinds, range: [colours.one, colours.mark, colours.two] } },
            shape: { field: "kind", type: "nominal", legend: null, scale: { domain: kinds, range: ["circle", "triangle-up", "diamond"] } },
            size: { condition: [{ test: "datum.kind === 'chosen'", value: 140 }, { test: "datum.kind === 'found'", value: 90 }], value: 22 },
            tooltip: [{ field: "number", title: "channel" }, { field: "value", format: ".4g", title: name }],
          },
        },
        { data: { values: broken.map(one => ({ number: one.number })) }, mark: { type: "rule", strokeDash: [3, 2], stroke: colours.mark, opacity: 0.8 }, encoding: { x: { field: "number", type: "quantitative" }, tooltip: [{ field: "number", title: "no number in channel" }] } },
      ],
    }), { label: `${layers.name[layer]}: ${title} of ${plural(all.length, "channel")}. ${words} ${marked.length ? `Found: ${marked.slice(0, 12).join(", ")}.` : ""}` });
  });
}

function readingOf(layer, one) {
  const minus = value => (value < 0 ? `+ ${short(-value)}` : `− ${short(value)}`);
  const plus = value => (value < 0 ? `− ${short(-value)}` : `+ ${short(value)}`);
  const factor = (one.weight < 0 ? -1 : 1) * one.gain;
  const formula = Number.isFinite(factor) && Number.isFinite(one.running_mean)
    ? ` In eval mode an input x becomes (x ${minus(one.running_mean)}) × ${short(factor)} ${plus(one.bias)}.`
    : "";
  return `${layers.name[layer]}, channel ${one.number}: running_mean ${short(one.running_mean)}, running_var ${short(one.running_var)}, weight ${short(one.weight)}, bias ${short(one.bias)}.${formula}`;
}

// ---------------------------------------------------------------- findings

function findingCards() {
  document.querySelectorAll("[data-rule]").forEach(card => {
    const found = data.findings[Number(card.dataset.rule)];
    const place = find("[data-strips]", card);
    const pick = find("[data-pick]", card);
    const show = () => {
      const one = found[pick ? Number(pick.value) : 0];
      find("[data-message]", card).textContent = `${capitalised(one.message)}.`;
      find("[data-marks]", card).hidden = !one.channels.length;
      find("[data-advice]", card).textContent = one.advice;
      drawStrips(place, one.layer, one.channels);
    };
    if (pick) {
      pick.append(...found.map((one, at) => element("option", { value: at }, layers.name[one.layer])));
      pick.addEventListener("change", show);
    }
    whenSeen(place, show);
  });
}

// ---------------------------------------------------------------- the map and the chooser

const ROWS = 60;
const DIGITS = 3; // of a row's place
const QUANTITIES = {
  deviations: ["running_mean ÷ √running_var", one => one.deviations, true],
  variance: ["running_var (log scale)", one => Math.log10(one.running_var), false], // drawn as logarithms
  gain: ["gain (log scale)", one => Math.log10(one.gain), false],
  weight: ["weight", one => one.weight, true],
  bias: ["bias", one => one.bias, true],
};
const state = { page: 0, listed: 50, order: [] };

function chosenLayers(form) {
  const { filter, order, found } = form.elements;
  const wanted = filter.value.trim().toLowerCase();
  const number = at => layers.error[at] * 1e6 + layers.warning[at] * 1e3 + layers.info[at];
  const isFound = at => layers.error[at] + layers.warning[at] > 0;
  const chosen = [...layers.name.keys()].filter(at => layers.name[at].toLowerCase().includes(wanted) && (!found.checked || isFound(at)));
  const by = order.value;
  const least = value => (Number.isNaN(value) ? -Infinity : value); // what is no number comes last
  if (by === "name") chosen.sort((a, b) => layers.name[a].localeCompare(layers.name[b], "en", { numeric: true }));
  else if (by === "findings") chosen.sort((a, b) => number(b) - number(a));
  else if (by === "running_var_min") chosen.sort((a, b) => least(-asNumber(layers[by][b])) - least(-asNumber(layers[by][a])));
  else if (by !== "model") chosen.sort((a, b) => least(asNumber(layers[by][b])) - least(asNumber(layers[by][a])));
  return chosen;
}

function drawMap(place, form, choose) {
  const drawable = state.order.filter(at => firstOf.has(at));
  const pages = Math.max(1, Math.ceil(drawable.length / ROWS));
  state.page = Math.min(state.page, pages - 1);
  const rows = drawable.slice(state.page * ROWS, (state.page + 1) * ROWS);
  const [title, value, diverges] = QUANTITIES[form.elements.quantity.value];
  // the place in the row leads, so that two layers of one name are two rows; it is not shown
  const places = rows.map((layer, row) => String(row).padStart(DIGITS, "0") + shortName(layers.name[layer]));
  const cells = [];
  rows.forEach((layer, row) => {
    for (const one of channelsOf(layer)) {
      const number = value(one);
      cells.push({ row: places[row], name: layers.name[layer], layer, number: one.number, start: one.number / layers.channels[layer], end: (one.number + 1) / layers.channels[layer], value: Number.isFinite(number) ? number : null, shown: short(diverges ? number : 10 ** number) });
    }
  });
  const sorted = cells.map(cell => cell.value).filter(one => one !== null).sort((a, b) => a - b);
  const at = share => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
  // the colours span all but the farthest hundredth, which would wash out the rest
  const reach = Math.max(Math.abs(at(0.005)), Math.abs(at(0.995))) || 1;
  const domain = diverges ? [-reach, 0, reach] : [at(0.005), at(0.995)];
  if (!diverges && domain[0] === domain[1]) domain[1] += 1;
  draw(place, (width, colours) => ({
    width, height: 15 * rows.length, autosize: { type: "fit-x", contains: "padding" },
    data: { values: cells },
    mark: { type: "rect", stroke: null, invalid: null },
    encoding: {
      y: { field: "row", type: "ordinal", sort: null, axis: { title: null, ticks: false, domain: false, labelLimit: Math.max(90, width / 3.5), labelExpr: `slice(datum.value, ${DIGITS})`, labelOverlap: false }, scale: { paddingInner: 0.12 } },
      x: { field: "start", type: "quantitative", axis: null, scale: { domain: [0, 1] } },
      x2: { field: "end" },
      color: {
        condition: { test: "!isValid(datum.value)", value: colours.mark },
        field: "value", type: "quantitative",
        scale: diverges ? { domain, range: ["#2166ac", "#f2f2f2", "#b35806"], clamp: true, interpolate: "lab" } : { domain, scheme: "cividis", clamp: true },
        legend: { title, titleLimit: 0, gradientLength: Math.min(220, width / 2), titleOrient: width < 500 ? "top" : "left", tickCount: 4, labelExpr: written(diverges ? "datum.value" : "toNumber(format(pow(10, datum.value), '.2~g'))") },
      },
      tooltip: [{ field: "name", title: "layer" }, { field: "number", title: "channel" }, { field: "shown", title: title.replace(" (log scale)", "") }],
    },
  }), { renderer: "canvas", label: `Map of ${plural(rows.length, "layer")} coloured by ${title}. The channel chooser below reads single channels.` }).then(view => {
    view?.addEventListener?.("click", (_, item) => item?.datum?.layer !== undefined && choose(item.datum.layer, item.datum.number));
  });
  return { pages, num: rows.length, drawable: drawable.length };
}

const shortName = name => (name.length > 34 ? `…${name.slice(-33)}` : name);

// the one that costs accuracy, else the one that moved farthest, else the first that a rule found, else the
// network's first
function startingChannel() {
  const guilty = data.gap?.worst ? layers.name.indexOf(data.gap.worst) : -1;
  if (firstOf.has(guilty)) return { layer: guilty, number: data.channel.layer === data.gap.worst ? data.channel.channel : 0 };
  const moved = data.comparison ? transposed(data.comparison).sort((a, b) => asNumber(b.kl) - asNumber(a.kl))[0] : undefined;
  const farthest = moved ? layers.name.indexOf(moved.name) : -1;
  if (firstOf.has(farthest) && moved.kl > 0) return { layer: farthest, number: moved.channel ?? 0 };
  const found = data.findings.flat().find(one => firstOf.has(one.layer));
  return found ? { layer: found.layer, number: found.channels[0] ?? 0 } : { layer: data.channels.layers[0], number: 0 };
}

function isVarianceToBlame() {
  const guilty = data.gap?.layers.find(layer => layer.name === data.gap.worst);
  return guilty !== undefined && Math.abs(Math.log(asNumber(guilty.ratio))) > asNumber(guilty.shift);
}

function explorer() {
  const section = document.getElementById("layers");
  if (!section) return;
  readChannels();
  const form = find("[data-controls]", section);
  const chooser = find("[data-chooser]", section);
  const { layer: pickLayer, number, range } = chooser.elements;
  const map = find("[data-figure='map']", section);
  const strips = find(".panel [data-strips]", section);
  let current = startingChannel();
  if (isVarianceToBlame()) form.elements.quantity.value = "variance";

  pickLayer.append(...data.channels.layers.map(at => element("option", { value: at }, layers.name[at])));
  const readout = () => {
    find("[data-reading]", section).textContent = readingOf(current.layer, channelOf(current.layer, current.number));
    drawStrips(strips, current.layer, [], current.number);
  };
  const choose = (layer, channel) => {
    const last = Math.max(0, layers.channels[layer] - 1);
    if (layer !== current.layer) tableOfChannels.stale = true;
    current = { layer, number: Math.max(0, Math.min(last, Math.round(channel) || 0)) };
    pickLayer.value = layer;
    number.max = range.max = last;
    number.value = range.value = current.number;
    readout();
    fillChannels();
  };
  const tableOfChannels = { place: find("[data-table='channels']", section), stale: true };
  const details = tableOfChannels.place.closest("details");
  const fillChannels = () => {
    if (!details.open || !tableOfChannels.stale) return;
    tableOfChannels.stale = false;
    fill(tableOfChannels.place, layers.name[current.layer], [
      ["Channel", one => short(one.number)], ["running_mean", one => short(one.running_mean)], ["running_var", one => short(one.running_var)],
      ["weight", one => short(one.weight)], ["bias", one => short(one.bias)], ["gain", one => short(one.gain)],
    ], channelsOf(current.layer));
  };
  details.addEventListener("toggle", fillChannels);

  const pager = find("[data-pager]", section);
  const more = find("[data-more]", section);
  const table = find("[data-table='layers']", section);
  const showMap = () => {
    if (waiting.has(map)) return;
    const { pages, num, drawable } = drawMap(map, form, choose);
    const turn = step => () => {
      state.page += step;
      showMap();
    };
    pager.replaceChildren(...(pages > 1 ? [
      element("button", { type: "button", onclick: turn(-1), disabled: state.page === 0 }, "Previous layers"),
      element("button", { type: "button", onclick: turn(1), disabled: state.page === pages - 1 }, "Next layers"),
      `The map shows ${num} of ${plural(drawable, "layer")}.`,
    ] : []));
  };
  const showTable = () => {
    const shown = state.order.slice(0, state.listed);
    const worst = at => layers.error[at] + layers.warning[at] > 0;
    const button = at => firstOf.has(at) ? element("button", { type: "button", onclick: () => { choose(at, 0); find(".panel", section).scrollIntoView({ block: "nearest" }); } }, layers.name[at]) : layers.name[at];
    const three = name => at => [layers[`${name}_min`][at], layers[`${name}_median`][at], layers[`${name}_max`][at]].map(value => short(value, 3)).join(" / ");
    fill(table, `${shown.length.toLocaleString("en")} of ${plural(numLayers, "layer")}`, [
      ["Layer", button], ["Channels", at => short(layers.channels[at])], ["Batches", at => short(layers.tracked[at])], ["Momentum", at => short(layers.momentum[at])],
      ["running_mean: min / median / max", three("running_mean")], ["running_var: min / median / max", three("running_var")],
      ["Largest gain", at => short(layers.gain_max[at])], ["Findings", at => short(layers.error[at] + layers.warning[at] + layers.info[at])],
    ], shown, { flagged: worst });
    more.replaceChildren(...(shown.length < state.order.length ? [
      element("button", { type: "button", onclick: () => { state.listed += 200; showTable(); } }, `Show 200 more of ${(state.order.length - shown.length).toLocaleString("en")}`),
    ] : []));
  };
  const update = () => {
    state.order = chosenLayers(form);
    state.page = 0;
    state.listed = 50;
    const left = numLayers - state.order.length;
    find("[data-status]", section).textContent = `${plural(state.order.length, "layer")}${left ? `, ${left.toLocaleString("en")} filtered out` : ""}.`;
    showMap();
    showTable();
  };
  form.addEventListener("submit", event => event.preventDefault());
  chooser.addEventListener("submit", event => event.preventDefault());
  let typing;
  form.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(update, 120);
  });
  pickLayer.addEventListener("change", () => choose(Number(pickLayer.value), 0));
  for (const input of [number, range]) input.addEventListener("input", () => choose(current.layer, Number(input.value)));
  whenSeen(map, showMap);
  update();
  if (data.channels.layers.length) whenSeen(strips, () => choose(current.layer, current.number));
  else find(".panel", section).hidden = true;
}

// ---------------------------------------------------------------- try it

const MOMENTA = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 1];
const STEPS = 150;
const CHANGE = { after: 75, factor: 1.5, shift: 1 }; // of the input, `shift` in its standard deviations

// a small generator with a seed (mulberry32), so that a picture can be had again
function randomness(seed) {
  let now = seed >>> 0;
  return () => {
    now = (now + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(now ^ (now >>> 15), now | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

// mean and variance of batches, and the averages that follow them as PyTorch's do: from 0 and 1, with the
// unbiased variance; a batch of a single value has none, and train mode refuses it
function simulate({ size, momentum, single, seed, moves }) {
  const { values, means, variances, num_positions: positions } = data.channel;
  const random = randomness(seed);
  const order = [...values.keys()];
  let next = order.length;
  const pick = () => {
    if (next >= order.length) {
      for (let at = order.length - 1; at > 0; at--) {
        const other = Math.floor(random() * (at + 1));
        [order[at], order[other]] = [order[other], order[at]];
      }
      next = 0;
    }
    return order[next++];
  };
  const count = size * (single ? 1 : positions);
  let [mean, variance] = [0, 1];
  const [same, changed] = phases(single);
  return Array.from({ length: STEPS }, (_, step) => {
    const batch = Array.from({ length: size }, pick);
    const centers = batch.map(at => (single ? values[at] : means[at]));
    const center = centers.reduce((sum, one) => sum + one, 0) / size;
    const between = centers.reduce((sum, one) => sum + (one - center) ** 2, 0) / size;
    const within = single ? 0 : batch.reduce((sum, at) => sum + variances[at], 0) / size;
    const now = moves && step >= CHANGE.after ? changed : same;
    const batchMean = now.mean(center);
    const batchVariance = count > 1 ? now.variance(((between + within) * count) / (count - 1)) : null;
    if (batchVariance !== null) {
      mean += momentum * (batchMean - mean);
      variance += momentum * (batchVariance - variance);
    }
    return { step: step + 1, batchMean, batchVariance, mean, variance };
  });
}

// the mean and variance of all images
const population = single => single ? spread(data.channel.values) : { mean: data.channel.population_mean, variance: data.channel.population_variance };

// what becomes of a mean and a variance before the change and after it
function phases(single) {
  const { mean, variance } = population(single);
  const far = CHANGE.shift * Math.sqrt(variance);
  return [
    { mean: one => one, variance: one => one },
    { mean: one => mean + far + CHANGE.factor * (one - mean), variance: one => CHANGE.factor ** 2 * one },
  ];
}

// what there is to see, a sentence or two on each slider
function lesson(rows, { size, momentum, single, moves }) {
  const truth = population(single).variance;
  const start = rows.slice(0, moves ? CHANGE.after : STEPS);
  const waits = share => Math.ceil(Math.log(share) / Math.log(1 - momentum));
  const batches = count => plural(count, "batch").replace("batchs", "batches");
  if (rows[0].batchVariance === null) {
    return [
      "A batch of a single value has no variance: the value is its own mean, so its distance from the mean is 0, and n − 1 is 0 too. PyTorch refuses such a batch in train mode.",
      "So there is nothing to average, and the running statistics stay what they were at the start, 0 and 1.",
    ];
  }
  const percent = fraction => `${short(Number((100 * fraction).toPrecision(2)))} %`;
  const off = Math.sqrt(start.reduce((sum, row) => sum + (row.batchVariance / truth - 1) ** 2, 0) / start.length);
  const alone = size === 1 ? " It is that image’s own, and knows nothing of how images differ. If an image gave 1 value (choose it above), there would be no variance at all." : "";
  const share = (1 - momentum) ** (moves ? STEPS - CHANGE.after : STEPS);
  const left = share > 0.01 ? ` After the last batch ${percent(share)} of what was ${moves ? "before the change" : "at the start, mean 0 and variance 1,"} is still in it.` : "";
  const noise = off * Math.sqrt(momentum / (2 - momentum));
  return [
    `The variance of ${size === 1 ? "a batch of one image" : `one batch of ${size} images`} is typically off by ${percent(off)}, and in train mode the layer normalises by it.${alone}`,
    momentum === 1
      ? "With momentum 1 the running average is the newest batch: it does not lag, and has all of that batch’s noise."
      : `With momentum ${momentum} each new batch counts ${percent(momentum)}. So the running average has followed half of a change after ${batches(waits(0.5))} and 99 % after ${batches(waits(0.01))}: until then it lags, and eval mode normalises by numbers of the past.${left} A larger momentum lags less but keeps more of the batches’ noise, here about ${percent(noise)} in the variance.`,
  ];
}

function spread(values) {
  const mean = values.reduce((sum, one) => sum + one, 0) / values.length;
  return { mean, variance: values.reduce((sum, one) => sum + (one - mean) ** 2, 0) / values.length };
}

function tryIt() {
  const form = find("[data-try]");
  if (!form) return;
  for (const [name, value] of Object.entries(data.channel)) { // behind a ruined layer some are words: NaN
    if (Array.isArray(value)) data.channel[name] = value.map(asNumber);
    else if (/^(population|running)_/.test(name)) data.channel[name] = asNumber(value);
  }
  const { size, momentum, kind, again, moves, size_text: sizeText, momentum_text: momentumText } = form.elements;
  size.max = Math.floor(Math.log2(data.channel.values.length));
  size.value = Math.min(3, size.max);
  let seed = 1;
  const histogram = find("[data-figure='histogram']");
  const average = find("[data-figure='average']");
  const table = find("[data-table='average']");
  const details = table.closest("details");
  let rows = [];
  const settings = () => ({ size: 2 ** Number(size.value), momentum: MOMENTA[Number(momentum.value)], single: !kind || kind.value === "single", moves: moves.checked, seed });
  const fillTable = () => details.open && fill(table, "The batches, in order", [
    ["Batch", row => short(row.step)], ["Mean of the batch", row => short(row.batchMean)], ["Running mean", row => short(row.mean)],
    ["Variance of the batch", row => short(row.batchVariance)], ["Running variance", row => short(row.variance)],
  ], rows);
  const update = () => {
    const now = settings();
    sizeText.value = String(now.size);
    momentumText.value = String(now.momentum);
    size.setAttribute("aria-valuetext", `${now.size} images`);
    momentum.setAttribute("aria-valuetext", String(now.momentum));
    rows = simulate(now);
    find("[data-lesson]").replaceChildren(...lesson(rows, now).map(text => element("p", {}, text)));
    fillTable();
    if (!waiting.has(average)) averageFigure(average, rows, now);
  };
  details.addEventListener("toggle", fillTable);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", update);
  again.addEventListener("click", () => {
    seed += 1;
    update();
  });
  whenSeen(histogram, () => histogramFigure(histogram));
  whenSeen(average, () => averageFigure(average, rows, settings()));
  update();
}

const BINS = 36;

function binned(values, low, high) {
  const width = (high - low || 1) / BINS;
  const bins = Array.from({ length: BINS }, (_, at) => ({ from: low + at * width, to: low + (at + 1) * width, images: 0 }));
  for (const value of values) if (Number.isFinite(value)) bins[Math.min(BINS - 1, Math.floor((value - low) / width))].images += 1;
  return bins;
}

const FAR = 3; // widths of the histogram to either side, beyond which a bar ends at the figure's edge

function histogramFigure(place) {
  const { values, population_mean, population_variance, running_mean, running_var } = data.channel;
  const kinds = ["all images", "the file"];
  const [low, high] = [-largestOf(values.map(value => -value)), largestOf(values)];
  const reach = (high - low || 1) * FAR;
  const inside = value => Math.min(high + reach, Math.max(low - reach, value));
  const bars = [[kinds[0], population_mean, population_variance], [kinds[1], running_mean, running_var]].map(([what, center, variance]) => {
    const [mean, deviation] = [asNumber(center), Math.sqrt(asNumber(variance))];
    return { what, mean, deviation, low: inside(mean - deviation), high: inside(mean + deviation), center: inside(mean) };
  }).filter(bar => Number.isFinite(bar.mean) && Number.isFinite(bar.deviation));
  draw(place, (width, colours) => {
    const both = { y: { field: "what", type: "nominal", sort: null, scale: { domain: kinds }, axis: { title: null, ticks: false, domain: false } }, color: { field: "what", type: "nominal", legend: null, scale: { domain: kinds, range: [colours.three, colours.two] } } };
    const inner = width - 96;
    return {
      spacing: 4,
      resolve: { scale: { x: "shared", y: "independent" } },
      vconcat: [
        {
          width: inner, height: 52, data: { values: bars },
          layer: [
            { mark: { type: "rule", strokeWidth: 5 }, encoding: { ...both, x: { field: "low", type: "quantitative", axis: null }, x2: { field: "high" }, tooltip: [{ field: "what" }, { field: "mean", format: ".4g" }, { field: "deviation", format: ".4g", title: "standard deviation" }] } },
            { mark: { type: "point", filled: true, size: 90, opacity: 1 }, encoding: { ...both, x: { field: "center", type: "quantitative" }, shape: { field: "what", type: "nominal", legend: null, scale: { domain: kinds, range: ["circle", "diamond"] } } } },
          ],
        },
        { width: inner, height: 190, data: { values: binned(values, low, high) }, mark: { type: "bar", color: colours.soft, opacity: 0.55, binSpacing: 1 }, encoding: { x: { field: "from", bin: "binned", type: "quantitative", axis: { title: "value that enters the channel", grid: false, tickCount: 8, ...NUMBERS } }, x2: { field: "to" }, y: { field: "images", type: "quantitative", axis: { title: "images", tickCount: 4 } }, tooltip: [{ field: "from", format: ".3g" }, { field: "to", format: ".3g" }, { field: "images" }] } },
      ],
    };
  }, { label: `Histogram of ${values.length} values. All images: mean ${short(population_mean)}, variance ${short(population_variance)}; the file: running_mean ${short(running_mean)}, running_var ${short(running_var)}.` });
}

function averageFigure(place, rows, { single, moves }) {
  const truth = population(single);
  const parts = moves ? [[0, CHANGE.after], [CHANGE.after, STEPS]] : [[0, STEPS]];
  const levels = name => parts.map(([from, to], at) => ({ from, to, value: phases(single)[at][name](truth[name]), series: "all images" }));
  const series = ["one batch", "running average", "all images"];
  const panel = (title, batch, running, width, colours, isLast) => ({
    width, height: 140,
    encoding: { x: { field: "step", type: "quantitative", axis: isLast ? { title: "batches", grid: false, tickCount: 6 } : { title: null, labels: false, grid: false, ticks: false }, scale: { domain: [0, STEPS], nice: false } } },
    layer: [
      ...(rows[0][batch] === null ? [] : [{ transform: [{ calculate: "'one batch'", as: "series" }], mark: { type: "point", filled: true, size: 16, opacity: 0.75 }, encoding: { y: { field: batch, type: "quantitative", axis: { title, tickCount: 4, ...NUMBERS }, scale: { zero: false } }, color: colour(colours, series), tooltip: [{ field: "step", title: "batch" }, { field: batch, format: ".4g", title }] } }]), // a single value has no variance
      { transform: [{ calculate: "'running average'", as: "series" }], mark: { type: "line", strokeWidth: 2.5 }, encoding: { y: { field: running, type: "quantitative", axis: { title, tickCount: 4, ...NUMBERS }, scale: { zero: false } }, color: colour(colours, series) } },
      { data: { values: levels(running) }, mark: { type: "rule", strokeWidth: 2, strokeDash: [6, 4] }, encoding: { x: { field: "from", type: "quantitative" }, x2: { field: "to" }, y: { field: "value", type: "quantitative" }, color: colour(colours, series) } },
    ],
  });
  const last = rows.at(-1);
  const end = name => short(levels(name).at(-1).value);
  draw(place, (width, colours) => ({
    data: { values: rows },
    spacing: 8,
    vconcat: [
      panel("mean", "batchMean", "mean", width - 66, colours, false),
      panel("variance", "batchVariance", "variance", width - 66, colours, true),
    ],
  }), { label: `Mean and variance of ${rows.length} batches with their running averages. At the end the running mean is ${short(last.mean)} and the running variance ${short(last.variance)}; those of all images are ${end("mean")} and ${end("variance")}.` });
}

const colour = (colours, series) => ({ field: "series", type: "nominal", legend: null, scale: { domain: series, range: [colours.one, colours.two, colours.three] } });

// ---------------------------------------------------------------- start

const FIGURES = {
  sweep: sweepFigure, scores: scoresFigure, guilt: guiltFigure, training: trainingFigure,
  history: historyFigures, comparison: comparisonFigure,
};
const TABLES = { guilt: guiltTable, training: trainingTable, history: historyTable, comparison: comparisonTable };

for (const [name, show] of Object.entries(FIGURES)) {
  const place = find(`[data-figure='${name}']`);
  if (place) whenSeen(place, () => show(place));
}
for (const [name, make] of Object.entries(TABLES)) {
  const place = find(`[data-table='${name}']`);
  if (place) lazily(place, () => make(place));
}
document.querySelectorAll(".table").forEach(place => tables.observe(place));
explorer();
findingCards();
tryIt();
document.documentElement.dataset.ready = "true";
