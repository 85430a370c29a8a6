"use strict";
// Draws what the page holds in #data (dsjax/train/page.py): curves, expert loads, the timeline. Text from the run only
// ever becomes text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = document.querySelector("svg").namespaceURI;
const PAD = { left: 54, right: 14, top: 14, bottom: 26 };
const CATEGORIES = {
  step: "blue", sample: "mint", compile: "violet", input: "green", checkpoint: "gold", eval: "cyan", check: "grey", rollback: "brick",
  restart: "orange", lost: "red", idle: "pale", other: "many",
};
const KINDS = {
  resume: "blue", spike: "orange", skip: "gold", rollback: "brick", checkpoint: "green", disk: "violet", stall: "cyan",
  corruption: "red", damaged: "red",
};
const RULE_EVERY = 30; // pixels a mark, on average: where there are more marks, no lines go down the picture
const LINES = ["blue", "orange", "green", "violet", "cyan", "gold", "brick", "grey"];

const $ = (id) => document.getElementById(id);
const categoryColor = (name) => (Object.hasOwn(CATEGORIES, name) ? CATEGORIES[name] : "many");
const kindColor = (name) => (Object.hasOwn(KINDS, name) ? KINDS[name] : "grey");
const paint = (name) => `var(--${name})`;
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

function make(parent, tag, attributes = {}, text) {
  const svg = parent.namespaceURI === SVG || tag === "svg";
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}

function colour(node, name) {
  node.style.setProperty("--c", paint(name));
  return node;
}

// ---- numbers ----

function suffixed(v, digits) {
  for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (Math.abs(v) >= size) return +(v / size).toFixed(digits) + suffix;
  return String(+v.toFixed(digits));
}

const power = (v, digits) => v.toExponential(digits).replace(/\.?0*e/, "e").replace("e+", "e").replace("e-", "e−");

function value(v) {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  if (a >= 1e4) return suffixed(v, 2);
  if (Number.isInteger(v)) return String(v);
  if (a < 1e-3) return power(v, 2);
  return a >= 100 ? v.toFixed(1) : a >= 1 ? v.toFixed(3) : String(+v.toPrecision(3));
}

const whole = (v) => v.toLocaleString("en-US");

function clock(seconds) {
  const s = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  const [d, h, m] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  return (d ? `${d} d ` : "") + (d || h ? `${d ? two(h) : h}:${two(m)}` : `${m}`) + `:${two(s % 60)}`;
}

function multiples(low, high, step) {
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-12) + 1e-300; k++) ticks.push(k * step);
  return ticks;
}

function ticks(low, high, n, least = 0) {
  const raw = (high - low) / Math.max(n, 1), ten = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(least, ten * [1, 2, 5, 10].find((m) => ten * m >= raw * 0.999));
  const most = Math.max(Math.abs(low), Math.abs(high)), digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const label = (v) => {
    if (v === 0) return "0";
    if (most >= 1e4) return suffixed(v, 3);
    return most < 2e-3 ? power(v, 2) : v.toFixed(digits);
  };
  return multiples(low, high, step).map((v) => [v, label(v)]);
}

function logTicks(low, high) {
  const decades = Math.log10(high / low), found = [];
  const parts = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const part of parts) {
      const v = part * 10 ** e;
      if (v >= low && v <= high) found.push([v, v >= 1e4 || v < 1e-3 ? power(v, 0) : String(+v.toPrecision(1))]);
    }
  return found;
}

function timeTicks(length, n) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
  let step = steps.find((s) => length / s <= n);
  for (let m = 1; !step; m *= 10) step = [2, 5, 10].map((k) => k * m * 86400).find((s) => length / s <= n);
  const [unit, name] = step >= 86400 ? [86400, "d"] : step >= 3600 ? [3600, "h"] : step >= 60 ? [60, "min"] : [1, "s"];
  return multiples(0, length, step).map((v) => [v, v === 0 ? "0" : length > 120 && step < 3600 ? clock(v) : `${v / unit} ${name}`]);
}

function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((v) => {
    if (v === null) return null;
    [sum, total] = [weight * sum + (1 - weight) * v, weight * total + 1 - weight];
    return sum / total;
  });
}

function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    steps[middle] < step ? (low = middle + 1) : (high = middle);
  }
  return low && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

// ---- what all pictures share: the stretch of steps in view, the cursor, the layer ----

const last = Math.max(1, ...[data.steps.train, data.steps.eval].map((steps) => steps.at(-1) ?? 0));
const view = { from: 0, to: last, layer: 0, weight: 0, marks: true };
const pictures = [];

function drawAll() {
  for (const picture of pictures) picture.draw();
  const zoomed = view.from > 0 || view.to < last;
  $("whole").hidden = !zoomed;
  $("range").textContent = zoomed ? `steps ${whole(Math.round(view.from))} to ${whole(Math.round(view.to))}` : "";
}

function zoom(from, to) {
  Object.assign(view, { from: Math.max(0, from), to: Math.min(last, Math.max(to, from + 1e-6)) });
  drawAll();
}

function pointAt(step) {
  for (const picture of pictures) picture.point?.(step);
}

function tell(event, lines) {
  const tip = $("tip");
  tip.hidden = !lines.length;
  if (tip.hidden) return;
  tip.replaceChildren();
  for (const [text, color] of lines) {
    const line = make(tip, "div");
    if (color) colour(make(line, "i"), color);
    line.append(text);
  }
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${clamp(event.clientY + 14, 4, innerHeight - height - 4)}px`;
}

function figure(parent, title, unit, size) {
  const box = make(parent, "figure", { class: size });
  const caption = make(box, "figcaption");
  const head = make(caption, "div", { class: "head" });
  make(head, "h3", {}, title);
  make(head, "span", { class: "unit" }, unit);
  const at = make(head, "span", { class: "at" }), legend = make(caption, "div", { class: "legend" });
  return { box, legend, at, plot: make(box, "div", { class: "plot" }) };
}

// The frame of a picture over steps: axes, incidents, pointer. `x` and `y` turn values into pixels.
class Steps {
  constructor(parent, title, unit, size, height) {
    Object.assign(this, figure(parent, title, unit, size), { height });
    this.svg = make(this.plot, "svg", { role: "img", "aria-label": title });
    this.listen();
    pictures.push(this);
  }

  frame() {
    this.width = Math.max(this.plot.clientWidth, 120);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.setAttribute("height", this.height);
    this.svg.replaceChildren();
    this.right = this.width - PAD.right;
    this.bottom = this.height - PAD.bottom;
    this.x = (step) => PAD.left + ((step - view.from) / (view.to - view.from)) * (this.right - PAD.left);
    this.clip = `clip${pictures.indexOf(this)}`;
    const clip = make(this.svg, "clipPath", { id: this.clip });
    const [before, after] = [view.from > 0 ? 0 : 4, view.to < last ? 0 : 4]; // room for dots at the ends
    const area = { x: PAD.left - before, y: 0, width: this.right - PAD.left + before + after, height: this.bottom + 4 };
    make(clip, "rect", area);
    const labels = ticks(view.from, view.to, (this.right - PAD.left) / 64, 1);
    for (const [step, label] of labels) {
      const at = this.x(step);
      make(this.svg, "line", { class: "axis", x1: at, x2: at, y1: this.bottom, y2: this.bottom + 4 });
      const anchor = at > this.right - 14 ? "end" : "middle";
      make(this.svg, "text", { x: anchor === "end" ? this.right : at, y: this.bottom + 17, "text-anchor": anchor }, label);
    }
    make(this.svg, "line", { class: "axis", x1: PAD.left, x2: this.right, y1: this.bottom, y2: this.bottom });
  }

  rule(at, label, grid) {
    if (grid) make(this.svg, "line", { class: "grid", x1: PAD.left, x2: this.right, y1: at, y2: at });
    make(this.svg, "text", { x: PAD.left - 8, y: at + 4, "text-anchor": "end" }, label);
  }

  incidents() {
    const drawn = new Map(); // of those that would cover one another, the last
    for (const [step, kind] of view.marks ? data.marks : [])
      if (step >= view.from && step <= view.to) drawn.set(Math.round(this.x(step) / 8), [this.x(step), kind]);
    for (const [at, kind] of drawn.values()) {
      const color = paint(kindColor(kind));
      make(this.svg, "path", { d: `M${at - 4} 1h8l-4 7z` }).style.fill = color;
      if (drawn.size > this.width / RULE_EVERY || !this.legend.isConnected) continue; // they would hide the curves, or the loads
      make(this.svg, "line", { class: "mark", x1: at, x2: at, y1: 8, y2: this.bottom }).style.stroke = color;
    }
    this.cursor = make(this.svg, "line", { class: "cursor", y1: PAD.top, y2: this.bottom, visibility: "hidden" });
    this.chosen = make(this.svg, "rect", { class: "chosen", y: PAD.top, height: this.bottom - PAD.top, width: 0 });
  }

  listen() {
    let start = null;
    const at = (event) => {
      const box = this.svg.getBoundingClientRect();
      return clamp(((event.clientX - box.left) / box.width) * this.width, PAD.left, this.right);
    };
    const step = (x) => view.from + ((x - PAD.left) / (this.right - PAD.left)) * (view.to - view.from);
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch" || event.button) return;
      start = at(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const x = at(event);
      pointAt(step(x));
      if (start !== null) {
        this.chosen.setAttribute("x", Math.min(start, x));
        this.chosen.setAttribute("width", Math.abs(x - start));
      }
      tell(event, [...(this.under?.(event, step(x)) ?? []), ...this.near(x)]);
    });
    this.svg.addEventListener("pointerup", (event) => {
      const [from, to] = [start, at(event)].sort((a, b) => a - b);
      if (start !== null && to - from > 6) zoom(step(from), step(to));
      else this.chosen?.setAttribute("width", 0);
      start = null;
    });
    this.svg.addEventListener("pointerleave", () => (pointAt(null), tell(null, [])));
    this.svg.addEventListener("dblclick", () => zoom(0, last));
  }

  near(x) {
    const found = (view.marks ? data.marks : []).filter(([step]) => Math.abs(this.x(step) - x) < 6);
    const lines = found.slice(0, 5).map(([step, kind, text]) => [`step ${whole(step)}, ${kind}: ${text}`, kindColor(kind)]);
    return found.length > 5 ? [...lines, [`and ${found.length - 5} more`]] : lines;
  }

  point(step) {
    if (!this.cursor) return;
    const inside = step !== null && step >= view.from && step <= view.to;
    this.cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    if (!inside) return;
    this.cursor.setAttribute("x1", this.x(step));
    this.cursor.setAttribute("x2", this.x(step));
  }
}

// ---- curves ----

class Curves extends Steps {
  constructor(parent, spec, size) {
    super(parent, spec.title, spec.unit, size, size === "big" ? 270 : size === "full" ? 240 : 190);
    this.show(spec);
  }

  show(spec) {
    this.spec = spec;
    this.legend.replaceChildren();
    const entry = (color, dash, name) => {
      const item = make(this.legend, "span");
      colour(make(item, "i", dash ? { class: "dash" } : {}), color);
      item.append(`${name} `);
      return make(item, "b");
    };
    this.values = spec.series.map((one) => entry(one.color, one.dash, one.name));
    for (const line of spec.lines) entry(line.color, true, line.name).textContent = value(line.value);
  }

  draw() {
    this.frame();
    const { series, lines } = this.spec;
    if (!series.length) {
      const middle = { class: "empty", x: (PAD.left + this.right) / 2, y: this.height / 2 };
      make(this.svg, "text", middle, this.spec.empty ?? "nothing yet");
      return;
    }
    const curves = series.map((one) => ({
      ...one,
      steps: data.steps[one.x],
      line: one.smooth && view.weight ? smoothed(one.y, view.weight) : one.y,
    }));
    this.scale(curves, lines);
    for (const line of lines) {
      const at = this.y(line.value);
      const rule = make(this.svg, "line", { x1: PAD.left, x2: this.right, y1: at, y2: at, "stroke-dasharray": "6 4" });
      rule.style.stroke = paint(line.color);
      if (at < PAD.top - 1 || at > this.bottom) rule.remove();
    }
    const inside = make(this.svg, "g", { "clip-path": `url(#${this.clip})` });
    for (const one of curves) if (one.lo) this.band(inside, one);
    for (const one of curves) {
      if (one.line !== one.y) this.line(inside, one, one.y, "faint");
      this.line(inside, one, one.line, "");
    }
    this.incidents();
    this.point(null);
  }

  scale(curves, lines) {
    let [low, high] = [Infinity, -Infinity];
    for (const one of curves)
      one.steps.forEach((step, k) => {
        if (step < view.from || step > view.to) return;
        for (const v of [one.y[k], one.lo?.[k], one.hi?.[k]])
          if (v !== null && v !== undefined && (!this.spec.log || v > 0)) [low, high] = [Math.min(low, v), Math.max(high, v)];
      });
    for (const line of lines) if (low <= high && line.value < 3 * high) [low, high] = [Math.min(low, line.value), Math.max(high, line.value)];
    if (low > high) [low, high] = this.spec.log ? [0.1, 1] : [0, 1];
    const log = this.spec.log && high / low > 3;
    if (log) [low, high] = [low / 1.1, high * 1.1];
    else if (this.spec.zero) [low, high] = [Math.min(low, 0), high > 0 ? high * 1.08 : 1];
    else {
      const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
      [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    }
    const part = log ? (v) => Math.log(Math.max(v, low / 10) / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
    this.y = (v) => this.bottom - part(v) * (this.bottom - PAD.top);
    for (const [v, label] of log ? logTicks(low, high) : ticks(low, high, this.height / 48)) this.rule(this.y(v), label, v !== low || log);
  }

  line(parent, one, values, look) {
    let path = "", pen = false;
    const dots = [];
    values.forEach((v, k) => {
      if (v === null) return void (pen = false);
      const [x, y] = [this.x(one.steps[k]).toFixed(1), this.y(v).toFixed(1)];
      path += `${pen ? "L" : "M"}${x} ${y}`;
      const alone = !pen && (values[k + 1] ?? null) === null;
      if ((one.dots && values.length <= 120) || alone) dots.push([x, y]);
      pen = true;
    });
    const color = paint(one.color);
    const stroke = make(parent, "path", { class: look, d: path, fill: "none", "stroke-width": one.bold ? 2.4 : 1.6, "stroke-linejoin": "round" });
    stroke.style.stroke = color;
    if (one.dash) stroke.setAttribute("stroke-dasharray", "2 3");
    for (const [cx, cy] of dots) make(parent, "circle", { class: look, cx, cy, r: 3 }).style.fill = color;
  }

  band(parent, one) {
    let path = "", run = [];
    const close = () => {
      if (run.length > 1) path += `M${run.map(([x, , high]) => `${x} ${high}`).join("L")}L${run.reverse().map(([x, low]) => `${x} ${low}`).join("L")}Z`;
      run = [];
    };
    one.lo.forEach((low, k) => {
      if (low === null) return close();
      run.push([this.x(one.steps[k]).toFixed(1), this.y(low).toFixed(1), this.y(one.hi[k]).toFixed(1)]);
    });
    close();
    const area = make(parent, "path", { class: "band", d: path });
    area.style.fill = area.style.stroke = paint(one.color);
  }

  point(step) {
    super.point(step);
    let told = null;
    this.spec.series.forEach((one, n) => {
      const steps = data.steps[one.x];
      const k = step === null ? steps.length - 1 : nearest(steps, step);
      if (told === null || one.x === "train") told = steps[k];
      const spread = one.lo && one.lo[k] !== null && step !== null ? ` (${value(one.lo[k])} to ${value(one.hi[k])})` : "";
      this.values[n].textContent = value(one.y[k]) + spread;
    });
    this.at.textContent = step === null || told === null ? "" : `step ${whole(told)}`;
  }
}

// ---- experts ----

const loads = data.loads && { ...data.loads, bytes: Uint8Array.from(atob(data.loads.bytes), (c) => c.charCodeAt(0)) };
const shareOf = (code) => (code === 255 ? null : code === 0 ? 0 : 2 ** ((code - 128) / 16));
let table = null;

function mixed(low, few, high, part) {
  const [a, b, t] = part < 0.5 ? [low, few, 2 * part] : [few, high, 2 * part - 1];
  return a.map((v, k) => Math.round(v + (b[k] - v) * t));
}

function rgb(name) {
  const probe = make(document.body, "i");
  probe.style.color = paint(name);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
}

function colours() {
  const ends = ["low", "few", "high"].map(rgb);
  const bytes = new Uint8ClampedArray(4 * 256); // of no value: transparent
  for (let code = 0; code < 255; code++) bytes.set([...mixed(...ends, Math.min(shareOf(code), 2) / 2), 255], 4 * code);
  table = new Uint32Array(bytes.buffer);
  const canvas = $("scale").querySelector("canvas"), ink = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    ink.fillStyle = `rgb(${mixed(...ends, x / (canvas.width - 1))})`;
    ink.fillRect(x, 0, 1, canvas.height);
  }
}

// The loads of a layer, a pixel an expert and column.
function bitmap(canvas, layer) {
  const [width, height] = [loads.steps.length, loads.experts];
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height), start = layer * width * height;
  const pixels = new Uint32Array(image.data.buffer);
  for (let k = 0; k < pixels.length; k++) pixels[k] = table[loads.bytes[start + k]];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

class Load extends Steps {
  constructor(parent) {
    super(parent, "Expert load", "over the layer's mean", "full", clamp(loads.experts * 12, 170, 400) + PAD.top + PAD.bottom);
    this.canvas = make(this.plot, "canvas");
    this.legend.remove();
  }

  draw() {
    this.frame();
    const { experts, steps } = loads, ratio = devicePixelRatio || 1;
    const [width, height] = [this.right - PAD.left, this.bottom - PAD.top];
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    Object.assign(this.canvas.style, { left: `${PAD.left}px`, top: `${PAD.top}px`, width: `${width}px`, height: `${height}px` });
    const ink = this.canvas.getContext("2d"), source = bitmap(document.createElement("canvas"), view.layer);
    ink.imageSmoothingEnabled = false;
    const at = (step) => Math.round((this.x(step) - PAD.left) * ratio);
    steps.forEach((to, k) => {
      const left = at(k ? steps[k - 1] : 0), right = at(to);
      if (right >= 0 && left <= this.canvas.width)
        ink.drawImage(source, k, 0, 1, experts, left, 0, Math.max(1, right - left), this.canvas.height);
    });
    this.box.querySelector("h3").textContent = `Expert load, ${data.layers[view.layer]}`;
    for (const [expert, label] of ticks(0, experts - 1, height / 40, 1)) this.rule(PAD.top + ((expert + 0.5) / experts) * height, label, false);
    make(this.svg, "text", { x: 12, y: PAD.top + height / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${PAD.top + height / 2})` }, "expert");
    this.incidents();
  }

  under(event, step) {
    const box = this.svg.getBoundingClientRect(), { experts, steps } = loads;
    const part = (((event.clientY - box.top) / box.height) * this.height - PAD.top) / (this.bottom - PAD.top);
    const k = steps.findIndex((to) => step <= to);
    if (part < 0 || part >= 1 || k < 0) return [];
    const expert = Math.floor(part * experts), from = (k ? steps[k - 1] : 0) + 1;
    const share = shareOf(loads.bytes[(view.layer * experts + expert) * steps.length + k]);
    const text = share === null ? "no tokens" : share === 0 ? "no token" : `${share.toFixed(2)} × the mean`;
    return [[`expert ${expert}, steps ${whole(from)} to ${whole(steps[k])}: ${text}`]];
  }
}

function violation() {
  const v = data.violation, n = data.layers.length;
  const chart = { title: "MaxVio", unit: "busiest expert over the mean, minus 1", zero: true, log: false, lines: [], series: [] };
  if (v && v.layers.length && n <= LINES.length)
    chart.series = v.layers.map((y, k) => ({ name: data.layers[k], color: LINES[k], x: "train", y, smooth: true, bold: k === view.layer }));
  else if (v) {
    chart.series = [{ name: `mean of ${n} layers, from lowest to highest`, color: "blue", x: "train", ...v, smooth: true }];
    if (v.layers.length) chart.series.push({ name: data.layers[view.layer], color: "orange", x: "train", y: v.layers[view.layer], smooth: true });
  }
  return chart;
}

function experts() {
  const names = data.layers, select = $("layer");
  names.slice(0, loads.bytes.length / (loads.experts * loads.steps.length)).forEach((name, k) => make(select, "option", { value: k }, name));
  make($("scale"), "span", {}, "0");
  make($("scale"), "canvas", { width: 130, height: 1 });
  make($("scale"), "span", {}, "2 and more");
  colours();
  new Load($("load"));
  const chart = data.violation && new Curves($("load"), violation(), "full");
  const buttons = [...select.options].map((option, k) => {
    const button = make($("layers"), "button", { type: "button" });
    const head = make(button, "span", {}, option.textContent), at = data.violation?.layers[k]?.at(-1);
    if (at !== undefined) make(head, "b", { title: "MaxVio, last point" }, value(at));
    button.addEventListener("click", () => choose(k));
    return [button, make(button, "canvas")];
  });
  const thumbnails = () => buttons.forEach(([, canvas], k) => bitmap(canvas, k));
  function choose(layer) {
    view.layer = layer;
    select.value = layer;
    buttons.forEach(([button], k) => button.setAttribute("aria-pressed", k === layer));
    chart?.show(violation());
    for (const picture of pictures) if (picture instanceof Load || picture === chart) picture.draw();
  }
  select.addEventListener("change", () => choose(+select.value));
  choose(0);
  thumbnails();
  const column = loads.rows > 1 ? `A column is the sum of ${whole(loads.rows)} rows of metrics` : "A column is a row of metrics";
  $("grain").textContent = `${column}, drawn from the step after the column before it to its own; values are kept to within 2.2%. Beside a layer's name: the last point of its MaxVio.`;
  return () => (colours(), thumbnails());
}

// ---- time ----

function shares() {
  const totals = Object.create(null);
  for (const [, , , , , seconds] of data.spans) for (const [name, s] of Object.entries(seconds)) totals[name] = (totals[name] ?? 0) + s;
  const whole = Object.values(totals).reduce((a, b) => a + b, 0);
  const order = [...Object.keys(CATEGORIES), ...Object.keys(totals).filter((name) => !(name in CATEGORIES))];
  for (const name of order.filter((name) => totals[name] > 0)) {
    const part = colour(make($("shares"), "span"), categoryColor(name));
    part.style.flex = `${totals[name] / whole} 0 0`;
    part.addEventListener("pointermove", (event) => tell(event, [[`${name}: ${clock(totals[name])}, ${((100 * totals[name]) / whole).toFixed(1)}%`, categoryColor(name)]]));
    part.addEventListener("pointerleave", () => tell(null, []));
  }
  return order;
}

class Time {
  constructor(order) {
    this.order = order;
    const { plot, legend } = figure($("time"), "Wall clock", "what each stretch of time went into", "full");
    legend.remove();
    this.plot = plot;
    this.svg = make(plot, "svg", { role: "img", "aria-label": "wall clock" });
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => tell(null, []));
    pictures.push(this);
  }

  draw() {
    const width = Math.max(this.plot.clientWidth, 120), height = 200, top = 22, bottom = height - PAD.bottom;
    const length = data.spans.at(-1)[1] || 1, right = width - PAD.right;
    this.x = (s) => PAD.left + (s / length) * (right - PAD.left);
    this.seconds = (x) => ((x - PAD.left) / (right - PAD.left)) * length;
    this.width = width;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren();
    let session = null, labelled = -Infinity;
    const starts = [];
    for (const [begin, end, number, , , seconds] of data.spans) {
      let y = bottom;
      const all = Object.values(seconds).reduce((a, b) => a + b, 0) || 1;
      for (const name of this.order.filter((name) => seconds[name])) {
        const tall = (seconds[name] / all) * (bottom - top);
        y -= tall;
        const box = { x: this.x(begin), y, width: Math.max(this.x(end) - this.x(begin), 0.3), height: tall, "shape-rendering": "crispEdges" };
        make(this.svg, "rect", box).style.fill = paint(categoryColor(name));
      }
      if (number !== session) starts.push([begin, (session = number)]);
    }
    for (const [begin, number] of starts) {
      const at = this.x(begin);
      make(this.svg, "line", { class: "axis", x1: at, x2: at, y1: top - 8, y2: top }).style.stroke = paint("grey");
      if (at < labelled + 62) continue;
      make(this.svg, "text", { x: at, y: top - 11, "text-anchor": at > right - 56 ? "end" : "start" }, `session ${number}`);
      labelled = at;
    }
    for (const part of [0, 0.5, 1]) make(this.svg, "text", { x: PAD.left - 8, y: bottom - part * (bottom - top) + 4, "text-anchor": "end" }, `${100 * part}%`);
    for (const [s, label] of timeTicks(length, (right - PAD.left) / 90)) {
      make(this.svg, "line", { class: "axis", x1: this.x(s), x2: this.x(s), y1: bottom, y2: bottom + 4 });
      make(this.svg, "text", { x: this.x(s), y: bottom + 17, "text-anchor": this.x(s) > right - 16 ? "end" : "middle" }, label);
    }
    make(this.svg, "line", { class: "axis", x1: PAD.left, x2: right, y1: bottom, y2: bottom });
  }

  hover(event) {
    const box = this.svg.getBoundingClientRect();
    const at = this.seconds(((event.clientX - box.left) / box.width) * this.width);
    const span = data.spans.find(([begin, end]) => at >= begin && at < end);
    if (!span) return tell(event, []);
    const [begin, end, session, first, to, seconds] = span;
    const steps = to > first ? `, steps ${whole(first + 1)} to ${whole(to)}` : "";
    const parts = this.order.filter((name) => seconds[name]).map((name) => [`${name} ${seconds[name].toFixed(1)} s, ${((100 * seconds[name]) / (end - begin)).toFixed(0)}%`, categoryColor(name)]);
    tell(event, [[`${clock(begin)} to ${clock(end)}, session ${session}${steps}`], ...parts]);
  }
}

// ---- the page ----

for (const spec of data.charts) new Curves($("charts"), spec, spec.big ? "big" : "small");
const recolour = loads && $("layer") ? experts() : () => {};
if (data.spans.length && $("shares")) new Time(shares());
for (const key of document.querySelectorAll("[data-category]")) colour(key, categoryColor(key.dataset.category));
for (const dot of document.querySelectorAll("[data-kind]")) colour(dot, kindColor(dot.dataset.kind));
drawAll();

$("whole").addEventListener("click", () => zoom(0, last));
$("marks").addEventListener("change", (event) => ((view.marks = event.target.checked), drawAll()));
$("smooth").addEventListener("input", (event) => {
  view.weight = +event.target.value;
  $("smoothing").textContent = view.weight ? view.weight.toFixed(2) : "none";
  drawAll();
});
const dark = matchMedia("(prefers-color-scheme: dark)");
const repaint = () => (recolour(), drawAll());
dark.addEventListener("change", repaint);
$("theme").addEventListener("click", () => {
  const now = document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light");
  document.documentElement.style.colorScheme = now === "dark" ? "light" : "dark";
  repaint();
});
let waiting = 0;
addEventListener("resize", () => (cancelAnimationFrame(waiting), (waiting = requestAnimationFrame(drawAll))));
