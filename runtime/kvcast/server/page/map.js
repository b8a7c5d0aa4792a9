// The live map: which blocks each layer attends to, where attention goes, and the figures of the session.

import { getJson } from "./api.js";
import { bytes, element, number } from "./text.js";

const $ = (id) => document.getElementById(id);
const LAYER_PX = 5;
let kv = null;
let selected = null;
let asking = 0;

const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

function colour(name) {
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map(Number);
  return [r, g, b];
}

const mix = (a, b, share) => a.map((x, i) => x + (b[i] - x) * share);
const ramp = (shade) => Array.from({ length: 256 }, (_, i) => shade(i / 255));

/** A cell per layer and block, stretched over the canvas; `shade(i)` is the colour of the i-th. */
function paint(canvas, shade) {
  const { n_layer: height, n_blocks: width } = kv;
  const cells = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = shade(i);
    cells.data[4 * i] = r;
    cells.data[4 * i + 1] = g;
    cells.data[4 * i + 2] = b;
    cells.data[4 * i + 3] = 255;
  }
  const small = element("canvas", { width, height });
  small.getContext("2d").putImageData(cells, 0, 0);
  const scale = devicePixelRatio || 1;
  canvas.style.height = `${Math.max(120, Math.min(200, height * LAYER_PX))}px`;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = width > canvas.width;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (selected !== null) {
    const x = (selected / width) * canvas.width;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--text");
    context.lineWidth = scale;
    context.strokeRect(x - scale, scale / 2, Math.max(3 * scale, canvas.width / width + 2 * scale), canvas.height - scale);
  }
}

function draw() {
  if (!kv?.maps || !kv.n_blocks || !$("panel").open) return;
  const [resident, fetched, attention] = ["resident", "fetched", "attention"].map((name) => unpack(kv.maps[name]));
  const [none, blue, orange] = ["--none", "--resident", "--fetched"].map(colour);
  const set = ramp((x) => mix(none, blue, x && 0.25 + 0.75 * x));
  paint($("attended"), (i) => (fetched[i] ? mix(set[resident[i]], orange, 0.4 + 0.6 * (fetched[i] / 255)) : set[resident[i]]));
  const [low, middle, high] = ["--low", "--middle", "--high"].map(colour);
  const heat = ramp((x) => (x < 0.5 ? mix(low, middle, 2 * x) : mix(middle, high, 2 * x - 1)));
  paint($("attention"), (i) => heat[attention[i]]);
}

function figures() {
  const pairs = [
    ["Speed", kv.tok_s ? `${kv.tok_s.toFixed(1)} tok/s` : "–"],
    ["Context", `${number(kv.n_tokens)} of ${number(kv.n_ctx)}`],
    ["KV cache", bytes(kv.store_bytes) + (kv.pool_bytes ? ` + ${bytes(kv.pool_bytes)} pool` : "")],
  ];
  if (kv.path !== "dense") {
    pairs.push(
      ["Attended to", `${number(Math.min(kv.budget, kv.n_tokens))} tokens`],
      ["Compression", kv.compression ? `${kv.compression.toFixed(1)}×` : "–"],
      ["Recovery (est.)", kv.recovery ? `${(100 * kv.recovery).toFixed(0)} %` : "–"],
    );
  }
  $("figures").replaceChildren(...pairs.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

/** Show a snapshot of GET /v1/kv. */
export function show(snapshot) {
  const before = kv;
  kv = snapshot;
  if (kv.state === "loading" || kv.state === "failed") return;
  figures();
  const { n_done, n_tokens } = kv.progress;
  $("reading").hidden = kv.state !== "reading" || !n_tokens;
  if (!$("reading").hidden) {
    Object.assign($("progress"), { max: n_tokens, value: n_done });
    $("reading").firstElementChild.textContent = `Reading: ${number(n_done)} of ${number(n_tokens)} tokens`;
  }
  const drawn = kv.maps && kv.n_blocks;
  $("maps").hidden = !drawn;
  $("no-map").textContent = kv.path === "dense" ? "This model runs dense: every token attends to the whole context."
    : drawn ? "" : "The map appears with the first answer.";
  if (!drawn) return select(null);
  $("attended").setAttribute("aria-valuemax", kv.n_blocks - 1);
  if (selected !== null && before?.n_tokens > kv.n_tokens) select(null); // another conversation: other text
  draw();
}

function select(block) {
  selected = block === null ? null : Math.max(0, Math.min(kv.n_blocks - 1, block));
  $("block").hidden = selected === null;
  draw();
  if (selected === null) return;
  const first = selected * kv.block_tokens;
  const heading = `Block ${number(selected)}, tokens ${number(first)} to ${number(Math.min(first + kv.block_tokens, kv.n_tokens) - 1)}`;
  $("attended").setAttribute("aria-valuenow", selected);
  $("attended").setAttribute("aria-valuetext", heading);
  clearTimeout(asking);
  asking = setTimeout(async () => {
    let text;
    try {
      text = (await getJson(`v1/kv/text?block=${selected}`)).text;
    } catch (error) {
      text = error.message;
    }
    $("block").querySelector("h2").textContent = heading;
    $("block").querySelector("pre").textContent = text;
    $("attended").setAttribute("aria-valuetext", `${heading}: ${text}`);
  }, 60);
}

function atPointer(event) {
  const { left, width } = event.currentTarget.getBoundingClientRect();
  if (event.buttons & 1) select(Math.floor(((event.clientX - left) / width) * kv.n_blocks));
}

const KEYS = {
  ArrowRight: () => selected + 1, ArrowUp: () => selected + 1, ArrowLeft: () => selected - 1, ArrowDown: () => selected - 1,
  PageUp: () => selected + 10, PageDown: () => selected - 10, Home: () => 0, End: () => Infinity,
};

export function start() {
  for (const id of ["attended", "attention"]) {
    $(id).addEventListener("pointerdown", atPointer);
    $(id).addEventListener("pointermove", atPointer);
  }
  $("attended").addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(null);
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    select(selected === null ? 0 : KEYS[event.key]());
  });
  new ResizeObserver(draw).observe($("panel"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const narrow = matchMedia("(max-width: 62rem)");
  const fold = () => { $("panel").open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
}
