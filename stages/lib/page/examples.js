"use strict";
// Images, what was found in them, and what they took.

function drawExamples() {
  const section = find("#examples");
  const state = { cell: 0, example: 0, quality: 0 };
  const draw = () => {
    const { method, examples, skeletons } = data.examples[state.cell];
    const example = examples[state.example];
    for (const part of [".panels", ".grid"]) find(part, section).replaceChildren();
    if (!example) return find(".panels", section).append("No image of test has a saving of its own.");
    const coded = [data.anchor, method].map((name) => ({ name, ...example[name][state.quality] }));
    drawPanels(find(".panels", section), example, coded, skeletons);
    drawBars(find(".grid", section), example, coded);
  };
  const pick = (index) => {
    state.example = index;
    [...picker.children].forEach((button, i) => button.setAttribute("aria-pressed", i === index ? "true" : "false"));
    draw();
  };
  const picker = find(".picker", section);
  const button = ({ image_id, kind, saving }, i) => {
    const image = html("img", { src: data.pictures[image_id], alt: "", width: 88, height: 72 });
    return html("button", { type: "button", click: () => pick(i) }, image, kind, html("br"), `${signed(saving)} %`);
  };
  select(find(".controls", section), "Cell", data.cells.map(cellName), (index) => {
    state.cell = index;
    picker.replaceChildren(...data.examples[index].examples.map(button));
    pick(0);
  });
  slider(find(".rate", section), `Quality of ${data.anchor}`, qualities, (index) => {
    state.quality = index;
    draw();
  });
}

function drawPanels(parent, example, coded, skeletons) {
  const bits = coded.map((choice) => data.frame_bits + sum(choice.bits));
  const more = `${signed(100 * (bits[1] / bits[0] - 1))} % bits; `;
  const note = (i) => `${i ? more : ""}${whole(bits[i])} bits, loss ${fixed(coded[i].loss, 2)} objects`;
  const { truth, uncoded } = example;
  parent.append(
    panel("Ground truth", `${truth.length} objects`, example, truth, skeletons),
    panel("Uncoded features", `${uncoded.found.length} found`, example, uncoded.found, skeletons),
    ...coded.map(({ name, found }, i) => panel(name, note(i), example, found, skeletons)),
  );
}

function drawBars(parent, example, coded) {
  const series = coded.map(({ name, bits, phi }) => {
    const texts = phi.map((index) => (index < 0 ? "none" : qualities[index]));
    return { name, colour: methods[name].colour, values: bits, texts };
  });
  const labels = { xLabel: "scale", yLabel: "bits", digits: 0, unit: " bits" };
  bars(parent, "Bits of each scale, and its quality", scales, series, labels);
  for (const [quantity, yLabel] of Object.entries(QUANTITIES)) {
    const named = Object.entries(example[quantity]);
    const values = named.map(([name, of_image]) => ({ name, colour: colours[name], values: of_image }));
    const highest = quantity === "weight" ? 1 : 2 * SENSITIVE;
    bars(parent, `${capital(yLabel)} of this image`, scales, values, { xLabel: "scale", yLabel, highest });
  }
}

// ---------------------------------------------------------------- pictures

const LABELS = new Set(data.examples.flatMap(({ examples }) => examples.flatMap((e) => e.truth.map((o) => o.label))));
const labelOf = ({ label, score }) => (score === undefined ? label : `${label} ${score.toFixed(2)}`);

function panel(title, note, { image_id, width, height }, shapes, skeletons) {
  const unit = Math.max(width, height) / 100; // 2 to 3 px on the screen
  const label = `${title}: ${shapes.map(labelOf).join(", ") || "nothing"}`;
  const picture = svg("image", { href: data.pictures[image_id], width, height, preserveAspectRatio: "none" });
  const marks = shapes.map((shape) => drawn(shape, unit, width, skeletons[shape.label] ?? []));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, picture, ...marks);
  return html("figure", {}, html("figcaption", {}, title, html("small", {}, note)), root);
}

// Lines with a black edge: they can be seen on any picture.
function drawn(shape, unit, width, skeleton) {
  const { path, x, y } = geometry(shape, unit, skeleton);
  const colour = data.palette[Math.max([...LABELS].sort().indexOf(shape.label), 0) % data.palette.length];
  const line = (stroked, thick) =>
    svg("path", { d: path, style: `fill: none; stroke: ${stroked}; stroke-width: ${thick * unit}` });
  const font = `font-size: ${5.5 * unit}px; stroke-width: ${1.2 * unit}px`;
  const anchor = x > 0.65 * width ? "end" : "start"; // the label stays inside
  const at = { x: x + unit, y: Math.max(y - unit, 5.5 * unit), "text-anchor": anchor };
  const text = svg("text", { ...at, style: font }, labelOf(shape));
  return svg("g", {}, line("black", 1.8), line(colour, 1), text);
}

// A box, the outlines of a mask or keypoints -> a path, and where the label stands.
function geometry({ box, outlines, points }, unit, skeleton) {
  if (box) return { path: `M${box[0]},${box[1]}h${box[2]}v${box[3]}h${-box[2]}Z`, x: box[0], y: box[1] };
  if (outlines) {
    const [x = 0, y = 0] = outlines[0] ?? [];
    return { path: outlines.map((line) => `M${line.join(" ")}Z`).join(""), x, y };
  }
  const seen = points.filter((point) => point !== null);
  const dots = seen.map(([x, y]) => `M${x - unit},${y}h${2 * unit}`);
  const bones = skeleton.map(([a, b]) => [points[a - 1], points[b - 1]]).filter(([a, b]) => a && b);
  const top = seen.reduce((best, point) => (point[1] < best[1] ? point : best), seen[0] ?? [0, 0]);
  return { path: [...dots, ...bones.map(([a, b]) => `M${a}L${b}`)].join(""), x: top[0], y: top[1] };
}
