"use strict";
// The page's data (made by stages/lib/page.py), elements and charts. Data never becomes markup: it only reaches text
// nodes and attributes.

const data = JSON.parse(document.getElementById("data").textContent);
const { methods, scales, qualities, colours } = data;

// ---------------------------------------------------------------- elements and texts

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const find = (selector, parent = document) => parent.querySelector(selector);
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const unsigned = (text) => (Number(text) ? text : text.replace("-", "")); // a zero has no sign
const minus = (text) => text.replace("-", "\u2212");
const fixed = (value, digits) => (value === null ? "n/a" : minus(unsigned(value.toFixed(digits))));
const whole = (value) => Math.round(value).toLocaleString("en-US");
const signed = (value) => (value > 0 ? "+" : "") + fixed(value, 1);
const shown = (name) => name + (methods[name]?.sees_labels ? " *" : "");
const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";
const QUANTITIES = { weight: "weight w", sensitivity: "sensitivity k" };
const SENSITIVE = 3; // ends an axis: where a scale loses next to nothing, its sensitivity is noise over nothing
const cellName = (cell) => `${capital(cell.task)}, ${cell.codec.toUpperCase()}`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

function plain(value) {
  const size = Math.abs(value);
  const [unit, name] = size >= 1e6 ? [1e6, "M"] : size >= 1e3 ? [1e3, "k"] : [1, ""];
  return minus(String(+(value / unit).toPrecision(3))) + name;
}

// texts: the first columns, which hold text. Where it is wider than the page it scrolls, with the keyboard, too.
function tableOf(headers, rows, label, texts = 1) {
  const cell = (tag) => (text, i) => html(tag, { class: i < texts ? "text" : null }, text);
  const line = (tag, cells) => html("tr", {}, ...cells.map(cell(tag)));
  const body = html("tbody", {}, ...rows.map((cells) => line("td", cells)));
  const table = html("table", {}, html("thead", {}, line("th", headers)), body);
  return html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
}

// Both call `change` with the number of the option, now and whenever another one is chosen.
function select(parent, label, options, change) {
  const control = html("select", { change: () => change(control.selectedIndex) });
  control.append(...options.map((text) => html("option", {}, text)));
  parent.append(html("label", {}, `${label} `, control));
  change(0);
}

function slider(parent, label, options, change) {
  const middle = Math.floor(options.length / 2);
  const output = html("output", {}, options[middle]);
  const slide = () => {
    output.textContent = options[control.value];
    change(Number(control.value));
  };
  const control = html("input", { type: "range", min: 0, max: options.length - 1, value: middle, input: slide });
  parent.append(html("label", {}, `${label} `, control), output);
  change(middle);
}

// ---------------------------------------------------------------- charts

// draw(width, height) -> an SVG; the height is known before, so that nothing moves when it is drawn.
function chart(parent, title, height, draw, { note = null, keys = [] } = {}) {
  const box = html("div", { class: "plot", style: `height: ${height}px` });
  const small = note === null ? null : html("small", {}, ...[note].flat());
  const figure = html("figure", {}, html("figcaption", {}, title, small), box);
  if (keys.length) figure.insertBefore(legend(keys), box);
  parent.append(figure);
  box.redraw = () => box.replaceChildren(draw(box.clientWidth, height));
  box.redraw();
  return box.redraw;
}

addEventListener("resize", () => {
  for (const box of document.querySelectorAll(".plot")) box.redraw();
});

const sample = (parts) => svg("svg", { class: "key", viewBox: "0 0 30 14", "aria-hidden": "true" }, ...parts);
const legend = (keys) => html("div", { class: "keys" }, ...keys.map((k) => html("span", {}, sample(k.sample), k.name)));

const swatch = (colour) => [svg("rect", { x: 8, y: 1, width: 14, height: 12, style: `fill: ${colour}` })];
const stroke = (colour, dashes = "none") =>
  `fill: none; stroke: ${colour}; stroke-width: 1.7; stroke-dasharray: ${dashes}`;
const methodLine = (name) => stroke(methods[name].colour, methods[name].sees_labels ? "2 3" : "none");

// matplotlib's names; shapes of about 9 px around (0, 0)
const MARKERS = {
  o: "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z",
  s: "M-3.6,-3.6h7.2v7.2h-7.2Z",
  D: "M0,-5L5,0L0,5L-5,0Z",
  "^": "M0,-5L4.6,3.6H-4.6Z",
  v: "M0,5L4.6,-3.6H-4.6Z",
  P: "M-1.7,-5.1h3.4v3.4h3.4v3.4h-3.4v3.4h-3.4v-3.4h-3.4v-3.4h3.4Z",
  X: "M0,-2.2l2.2,-2.2l2.2,2.2l-2.2,2.2l2.2,2.2l-2.2,2.2l-2.2,-2.2l-2.2,2.2l-2.2,-2.2l2.2,-2.2l-2.2,-2.2l2.2,-2.2Z",
  "*": "M0,-5.8L1.4,-1.9L5.5,-1.8L2.3,0.7L3.4,4.7L0,2.4L-3.4,4.7L-2.3,0.7L-5.5,-1.8L-1.4,-1.9Z",
};

function marker(name, x, y) {
  const { colour, marker: shape, sees_labels } = methods[name];
  const style = `fill: ${sees_labels ? "var(--paper)" : colour}; stroke: ${colour}; stroke-width: 1.3`;
  return svg("path", { d: MARKERS[shape], transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, style });
}

// An axis: {low, high, label, log?, ticks?: [[value, text]]}. Where there are no ticks they are chosen.
function frame(width, height, x, y, { left = null, right = 12 } = {}) {
  const top = y.label ? 24 : 8;
  const bottom = x.label ? 38 : 22;
  const yTicks = y.ticks ?? ticks(y, (height - top - bottom) / 28);
  left ??= 14 + 6.6 * Math.max(...yTicks.map(([, name]) => name.length));
  const atX = scaled(x, left, width - right);
  const atY = scaled(y, height - bottom, top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}` });
  const line = (x1, y1, x2, y2) => svg("line", { x1, y1, x2, y2, class: "grid-line" });
  const text = (content, at) => svg("text", at, content);
  for (const [value, name] of x.ticks ?? ticks(x, (width - left - right) / 42)) {
    if (!x.plain) root.append(line(atX(value), top, atX(value), height - bottom));
    root.append(text(name, { x: atX(value), y: height - bottom + 15, "text-anchor": "middle", class: "soft" }));
  }
  for (const [value, name] of yTicks) {
    root.append(line(left, atY(value), width - right, atY(value)));
    root.append(text(name, { x: left - 6, y: atY(value) + 4, "text-anchor": "end", class: "soft" }));
  }
  if (x.label) root.append(text(x.label, { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }));
  if (y.label) root.append(text(y.label, { x: 2, y: 12 }));
  const draw = (pairs, style) =>
    root.append(
      curve(
        pairs.map(([a, b]) => [atX(a), atY(b)]),
        { style },
      ),
    );
  return { root, x: atX, y: atY, curve: draw };
}

function scaled({ low, high, log }, from, to) {
  const value = log ? Math.log : (v) => v;
  const clamp = (share) => Math.min(Math.max(share, -0.02), 1.02); // what is beyond lies on the edge
  return (v) => from + (to - from) * clamp((value(v) - value(low)) / (value(high) - value(low)));
}

function ticks({ low, high, log }, room) {
  const found = log ? logTicks(low, high, room) : linearTicks(low, high, room);
  return found.map((value) => [value, plain(value)]);
}

function linearTicks(low, high, room) {
  let step = 10 ** Math.floor(Math.log10((high - low) / Math.max(room, 2)));
  step *= [1, 2, 5, 10].find((factor) => (high - low) / (factor * step) <= Math.max(room, 2)) ?? 10;
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => +((first + i) * step).toPrecision(12));
}

function logTicks(low, high, room) {
  const decades = [];
  for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d++) decades.push(10 ** d);
  const choices = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]]
    .map((steps) => decades.flatMap((decade) => steps.map((s) => s * decade)).filter((v) => v >= low && v <= high))
    .filter((values) => values.length <= Math.max(room, 2));
  return choices.at(-1) ?? [];
}

const curve = (points, attributes) => svg("path", { d: "M" + points.map((p) => p.join(",")).join("L"), ...attributes });

const DASHED = "5 4";
const upright = (x, y1, y2) => svg("line", { x1: x, x2: x, y1, y2, style: stroke(colours.muted) });
const level = (x1, x2, y, dashes) => svg("line", { x1, x2, y1: y, y2: y, style: stroke(colours.muted, dashes) });
const dot = (x, y, colour) => svg("circle", { cx: x, cy: y, r: 3.5, style: `fill: ${colour}` });

function range(values, margin = 0.04) {
  const finite = values.filter((value) => value !== null);
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const room = margin * (high - low || Math.abs(high) || 1);
  return { low: low - room, high: high + room };
}

function logRange(values) {
  return { low: Math.min(...values) / 1.1, high: Math.max(...values) * 1.1, log: true };
}

const quantile = (values, share) => [...values].sort((a, b) => a - b)[Math.floor(share * (values.length - 1))];

// ---------------------------------------------------------------- what is under the pointer, or the focus

const tip = find("#tip");

function tell(lines, x, y) {
  tip.replaceChildren(...lines.map((line) => html("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(x - width / 2, 8), innerWidth - width - 8);
  const over = y - height - 14;
  tip.style.transform = `translate(${left}px, ${over > 8 ? over : y + 14}px)`;
}

// points: {x, y, series, lines}. One stop of the tab key for a chart; arrows go along a series and between them.
function explore(root, title, points) {
  const ring = svg("circle", { class: "ring", r: 8, visibility: "hidden" });
  let current = null;
  const hide = () => {
    tip.hidden = true;
    ring.setAttribute("visibility", "hidden");
  };
  const show = (point) => {
    current = point;
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    ring.setAttribute("visibility", "visible");
    const at = root.getBoundingClientRect();
    tell(point.lines, at.left + point.x, at.top + point.y);
  };
  const distance = (point, x, y) => Math.hypot(point.x - x, point.y - y);
  const nearest = (from, x, y) => from.reduce((best, p) => (distance(p, x, y) < distance(best, x, y) ? p : best));
  const move = (event) => {
    const at = root.getBoundingClientRect();
    const [x, y] = [event.clientX - at.left, event.clientY - at.top];
    const point = nearest(points, x, y);
    if (distance(point, x, y) < 30) show(point);
    else hide();
  };
  const key = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const names = [...new Set(points.map((point) => point.series))];
    const of = (name) => points.filter((point) => point.series === name);
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const along = of(current.series);
      show(along[Math.min(Math.max(along.indexOf(current) + step, 0), along.length - 1)]);
    } else {
      const other = names[(names.indexOf(current.series) + step + names.length) % names.length];
      show(nearest(of(other), current.x, current.y));
    }
  };
  root.append(ring);
  if (!points.length) return fill(root, { role: "img", "aria-label": title }, []);
  const label = `${title}. ${points.length} points; arrow keys move between them.`;
  const listeners = { pointermove: move, pointerdown: move, pointerleave: hide, blur: hide, keydown: key };
  const focus = () => show(current ?? points[0]);
  return fill(root, { tabindex: 0, role: "application", "aria-label": label, focus, ...listeners }, []);
}

// ---------------------------------------------------------------- bars

// A group of bars for each of `groups`; series: {name, colour, values, low?, high?, texts?}. Options: the labels of the
// axes, digits and unit of the values that the tip tells, and the highest value of the axis.
function bars(parent, title, groups, series, { xLabel, yLabel, digits = 2, unit = "", highest = Infinity }) {
  const ends = series.flatMap((s) => [...s.values, ...(s.low ?? []), ...(s.high ?? [])]).filter((v) => v !== null);
  const [low, high] = [Math.min(0, ...ends), Math.min(Math.max(0, ...ends), highest)];
  const room = 0.06 * (high - low || 1);
  const y = { low: low < 0 ? low - room : 0, high: high > 0 || low === 0 ? high + room : 0, label: yLabel };
  const names = groups.map((name, i) => [i, name]);
  const x = { low: -0.5, high: groups.length - 0.5, ticks: names, plain: true, label: xLabel };
  const tell = (s, i) => {
    const amount = digits ? fixed(s.values[i], digits) : whole(s.values[i]);
    const spread = s.low ? ` [${fixed(s.low[i], digits)}, ${fixed(s.high[i], digits)}]` : "";
    return [`${xLabel} ${groups[i]}, ${s.name}`, `${amount}${unit}${spread}`];
  };
  const draw = (width, height) => {
    const plot = frame(width, height, x, y);
    const zero = plot.y(0);
    const thick = (plot.x(1) - plot.x(0)) * (0.8 / series.length);
    const points = [];
    series.forEach((s, k) => {
      s.values.forEach((value, i) => {
        if (value === null) return;
        const middle = plot.x(i) + (k + 0.5 - series.length / 2) * thick;
        const end = plot.y(value);
        const size = { width: Math.max(thick - 2, 1), height: Math.abs(end - zero) };
        const at = { x: middle - size.width / 2, y: Math.min(zero, end), ...size };
        plot.root.append(svg("rect", { ...at, style: `fill: ${s.colour}` }));
        if (s.low) plot.root.append(upright(middle, plot.y(s.low[i]), plot.y(s.high[i])));
        if (s.texts) plot.root.append(svg("text", { x: middle, y: end - 4, class: "tiny" }, s.texts[i]));
        points.push({ x: middle, y: end, series: s.name, lines: tell(s, i) });
      });
    });
    plot.root.append(level(plot.x(x.low), plot.x(x.high), zero));
    return explore(plot.root, title, points);
  };
  const keys = series.map((s) => ({ name: s.name, sample: swatch(s.colour) }));
  return chart(parent, title, 220, draw, { keys });
}
