// The pictures of report.html, whose data (D) and helpers they use.
const picture = (title, text, ...what) => $("pictures").append(el("h2", {}, title), none(text), ...what);
const power = e => e ? `1e${e}` : "1";
const line = (x1, y1, x2, y2, more) => ns("line", {x1, y1, x2, y2, stroke: "var(--line)", ...more});
const label = (x, y, anchor, text, more) => ns("text", {x, y, "text-anchor": anchor, ...more}, text);
const dashed = {"stroke-dasharray": "4 4", stroke: "var(--soft)"};
const choose = s => ({style: "cursor:pointer", on: () => { chosen = s; draw(); $("map").scrollIntoView(); }});

const fit = w => Math.min(w, document.documentElement.clientWidth - 28);  // a telephone's letters stay legible

// Axes with ticks [[place from 0 to 1, text]]; x(t) and y(t) are where t from 0 to 1 lies.
function axes(wide, H, across, up, xTicks, yTicks, xTitle, yTitle) {
  const W = fit(wide), L = 60, B = 44, x = t => L + (W - L - 12) * t, y = t => H - B - (H - B - 12) * t;
  const g = ns("svg", {viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "aria-label": `${yTitle} against ${xTitle}`},
    ...xTicks.flatMap(([t, text]) => [line(x(t), 12, x(t), H - B), label(x(t), H - B + 16, "middle", text)]),
    ...yTicks.flatMap(([t, text]) => [line(L, y(t), W - 12, y(t)), label(L - 6, y(t) + 4, "end", text)]),
    label((L + W) / 2, H - 8, "middle", xTitle), label(14, H / 2, "middle", yTitle, {transform: `rotate(-90 14 ${H / 2})`}));
  return {g, x: v => x(across(v)), y: v => y(up(v)), left: L, right: W - 12, top: 12, bottom: H - B};
}
const decades = [0, -3, -6, -9, -12].map(t => [scaled(10 ** t), power(t)]);

// What one layer computes, from the top: own errors in the boxes, what is handed on in the lines
const flowBox = el("div", {}), LAYERS = Object.keys(D.flow).map(Number);
function drawFlow() {
  const l = D.flow[chosen.layer] ? chosen.layer : LAYERS[0], pairs = D.flow[l].filter(([a, b]) => [a, b].every(n => n === "input" || at.has(`${n}/${l}`)));
  const depth = new Map([["input", 0]]);
  for (const [a, b] of pairs) depth.set(b, Math.max(depth.get(b) || 0, (depth.get(a) || 0) + 1));
  const rows = [];
  for (const [n, d] of depth) (rows[d] ||= []).push(n);
  const W = fit(620), most = Math.max(...rows.map(r => r.length)), GAP = 52, BOX = Math.min(148, (W - 40) / most - 6), H = rows.length * GAP + 8, spot = new Map();
  rows.forEach((row, d) => row.forEach((n, i) => spot.set(n, [W / 2 + (i - (row.length - 1) / 2) * (BOX + Math.min(34, (W - 40) / most - BOX)), 6 + d * GAP])));
  const stage = n => at.get(`${n}/${l}`), shade = v => v > 0 ? hue(scaled(v)) : "var(--same)";
  const g = ns("svg", {viewBox: `0 0 ${W} ${H}`, width: W, class: "flow", role: "img", "aria-label": `operations of layer ${l}`});
  for (const [a, b] of pairs) {
    const [x, y] = spot.get(a), [u, v] = spot.get(b), s = stage(a), far = v - y > GAP, side = far ? (x + u < W ? 0 : W) : (x + u) / 2;
    g.append(ns("path", {d: far ? `M ${x} ${y + 28} C ${side} ${y + 60}, ${side} ${v - 30}, ${u} ${v}` : `M ${x} ${y + 28} L ${u} ${v}`, fill: "none",
      stroke: s && !s.same ? shade(s.relative_rms ?? 1) : "var(--line)", "stroke-width": s && !s.same ? 2.5 : 1.5}));
  }
  for (const [n, [x, y]] of spot) {
    const s = stage(n), own = s && (s.own_relative_rms || 0), bad = s && faulty(s);
    g.append(ns("g", s ? {on: () => { chosen = s; draw(); }} : {},
      ns("rect", {x: x - BOX / 2, y, width: BOX, height: 28, rx: 5, fill: "var(--panel)", stroke: bad ? "var(--bad)" : own > 0 ? shade(own) : "var(--line)", ...(bad || own > 0 || s === chosen ? {style: `stroke-width:${s === chosen ? 4 : 3}`} : {})}),
      label(x, y + 18, "middle", `${bad ? "● " : ""}${n}`), ns("title", {}, s ? `${where(s)}: ${s.same ? SAME : `${s.origin || "differs"}, own ${number(own)}, in all ${number(s.relative_rms)}`}` : "from the layer before")));
  }
  flowBox.replaceChildren(el("p", {class: "soft"}, `Layer ${l}, the one of the stage that is chosen. ● and a red box: faulty by itself. A line has the colour of the difference that it hands on; grey: none.`), g);
}
if (LAYERS.length && D.stages.some(s => !s.same)) {
  $("pictures").append(el("h2", {}, "One layer"), flowBox);
  alsoDrawn.push(drawFlow);
  drawFlow();
}

const outputs = layers.map(l => at.get(`post_ffn_residual/${l}`)).filter(Boolean);
if (outputs.some(s => !s.same) && outputs.length > 1) {
  const off = s => s.cosine === null ? 1 : Math.max(0, 1 - s.cosine), wrong = new Set(D.stages.filter(faulty).map(s => s.layer));
  const every = Math.ceil(layers.length / 12), most = layers.length - 1;
  const p = axes(620, 300, l => layers.indexOf(l) / most, v => scaled(v || 1e-12), layers.filter((_, i) => i % every === 0).map(l => [layers.indexOf(l) / most, l]), decades, "layer", "1 − cosine");
  p.g.append(line(p.left, p.y(.01), p.right, p.y(.01), dashed), label(p.right - 2, p.y(.01) - 4, "end", "cosine 0.99"),
    ns("polyline", {points: outputs.map(s => `${p.x(s.layer)},${p.y(off(s))}`).join(" "), fill: "none", stroke: "var(--soft)"}),
    ...outputs.map(s => ns("circle", {cx: p.x(s.layer), cy: p.y(off(s)), r: 4, fill: off(s) > .01 || wrong.has(s.layer) ? "var(--bad)" : "var(--soft)", ...choose(s)},
      ns("title", {}, `layer ${s.layer}: cosine ${number(s.cosine, 10)}${wrong.has(s.layer) ? "; an operation is faulty" : ""}`))));
  picture("Layer by layer", "How far each layer's output is from B's: 1 − cosine, logarithmic. Red: below 0.99, or an operation of the layer is faulty.", p.g);
}

const dots = D.stages.filter(s => !s.same && s.own_relative_rms !== undefined && s.relative_rms);
if (dots.length) {
  const p = axes(460, 330, scaled, scaled, decades, decades, "difference from B in all (relative RMS)", "own error"), floor = 10 ** LOW;
  p.g.append(line(p.x(floor), p.y(floor), p.x(1), p.y(1), dashed), line(p.left, p.y(ROUNDING), p.right, p.y(ROUNDING), dashed), label(p.right - 2, p.y(ROUNDING) - 4, "end", "float32 rounding"),
    ...dots.map(s => { const own = s.own_relative_rms || floor, bad = faulty(s) || own > ROUNDING;
      return ns("circle", {cx: p.x(s.relative_rms), cy: p.y(own), r: faulty(s) ? 5 : 3.5, fill: bad ? "var(--bad)" : "var(--soft)", opacity: .75, ...choose(s)},
        ns("title", {}, `${where(s)}: own ${number(s.own_relative_rms)}, in all ${number(s.relative_rms)}`)); }));
  picture("Own error against the whole difference", "A dot a stage of a layer. On the dashed diagonal a stage's difference is its own doing; at the bottom it is inherited.", p.g);
}
if (D.margins.some(([, , , drift]) => drift > 0)) {
  const NEAR = .01, LEAST = Math.min(-3, Math.floor(Math.log10(Math.min(...D.margins.flatMap(([, , m, d]) => [m, d]).filter(v => v > 1e-9))))), log = v => Math.min(1, Math.max(0, 1 - Math.log10(v || 1e-99) / LEAST)), tick = [...Array(1 - LEAST).keys()].map(t => -t).filter(t => LEAST > -6 || t % 2 === 0).map(t => [log(10 ** t), power(t)]);
  const up = v => .9 * log(v) + .1 * Math.min(1, Math.max(0, Math.log10(v || 1)));
  const p = axes(460, 330, log, up, tick, tick.map(([, t]) => [up(Number(t)), t]), "router margin (the smaller one)", "logits moved by");
  p.g.append(ns("rect", {x: p.left, y: p.y(NEAR), width: p.x(NEAR) - p.left, height: p.bottom - p.y(NEAR), fill: "var(--same)", opacity: .5}), label(p.x(NEAR) - 4, p.y(NEAR) + 14, "end", "near-tie"),
    line(p.x(10 ** LEAST), p.y(10 ** LEAST), p.x(1), p.y(1), dashed));
  for (const [l, position, margin, drift, changed] of [...D.margins].sort((x, y) => x[4] - y[4]))
    p.g.append(ns("circle", {cx: p.x(margin), cy: p.y(drift), r: changed ? 4.5 : 2, fill: changed ? "var(--bad)" : "var(--soft)", opacity: changed ? .9 : .45}, ns("title", {}, `layer ${l}, position ${position}: margin ${number(margin)}, logits moved by ${number(drift)}${changed ? ", other experts" : ""}`)));
  picture("Router margins", "A dot a token of a layer; red: it took other experts. Above the dashed line the logits moved further than the margin that kept its experts apart; in the green square any rounding may change them.", p.g);
}
if (D.router.changes.length && layers.length) {
  const found = D.router.changes, wide = layers.filter(l => found.some(c => c.layer === l)), E = 1 + Math.max(...found.flatMap(c => [...c.only_a, ...c.only_b]));
  const W = 60 + 90 * wide.length, H = Math.max(180, Math.min(560, 12 * E)) + 50, y = e => 26 + (H - 52) * e / Math.max(E - 1, 1);
  const g = ns("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "experts that changed, by layer"});
  wide.forEach((l, i) => {
    const a = 50 + 90 * i, b = a + 46;
    g.append(label(a + 23, 14, "middle", `layer ${l}`), line(a, 22, a, H - 22), line(b, 22, b, H - 22), label(a, H - 6, "middle", "A", {style: "fill:var(--a)"}), label(b, H - 6, "middle", "B", {style: "fill:var(--b)"}));
    for (const c of found.filter(x => x.layer === l)) for (const [n, e] of c.only_a.entries()) {
      const to = c.only_b[Math.min(n, c.only_b.length - 1)] ?? e;
      g.append(ns("g", {}, line(a, y(e), b, y(to), {stroke: c.cause === "near-tie" ? "var(--soft)" : "var(--bad)", "stroke-width": 1.6, opacity: .8}), ns("circle", {cx: a, cy: y(e), r: 4, fill: "var(--a)"}), ns("circle", {cx: b, cy: y(to), r: 4, fill: "var(--b)"}),
        label(a - 7, y(e) + 4, "end", e, {style: "font-size:11px"}), label(b + 7, y(to) + 4, "start", to, {style: "font-size:11px"}), ns("title", {}, `layer ${l}, position ${c.position}: A took ${c.only_a.join(" ")}, B ${c.only_b.join(" ")}: ${c.cause}`)));
    }
  });
  picture("Experts that changed", "The layers where a token took other experts: on the left A's, on the right B's, in the place of their numbers. Red: by an error; grey: a near-tie.", el("div", {class: "scroll"}, g));
}
const kl = new Map(D.kl.by_position), flips = new Map(D.argmax.changes.map(c => [c.position, c])), many = 400;
const columns = D.a.tokens.map((t, i) => [t, i]).slice(0, many), cut = D.a.tokens.length > many ? ` The first ${many} tokens.` : "";
const word24 = t => el("div", {class: "text", title: tokenText(t)}, D.texts[t] === undefined ? t : D.texts[t].slice(1, -1).replaceAll(" ", "·"));
if (D.kl.by_position.some(([, v]) => v > 0)) {
  const top = Math.max(...D.kl.by_position.map(([, v]) => v));
  picture("The next token, along the text", `KL(B‖A) after each token, in nats; the tallest bar is ${number(top)}. Red: the most likely next token is another.${cut}`, el("div", {class: "scroll"}, el("div", {class: "tokens"}, ...columns.map(([t, i]) => {
    const c = flips.get(i), says = `position ${i}, ${tokenText(t)}: ${kl.has(i) ? number(kl.get(i)) : "not compared"}${c ? `; A: ${tokenText(c.a)}, B: ${tokenText(c.b)}` : ""}`;
    return el("div", {title: says}, el("div", {class: c ? "bar flip" : "bar", style: `height:${Math.max(1, 90 * (kl.get(i) || 0) / top)}px`}), word24(t));
  }))));
  $("pictures").querySelectorAll(".tokens > div").forEach(d => { d.style.display = "grid"; d.style.gridTemplateRows = "90px auto"; d.firstChild.style.alignSelf = "end"; });
}
if (!D.accuracy && D.parted.length && layers.length) {
  const by = new Map(D.parted.map(([l, p, s]) => [`${l}/${p}`, s]));
  const grid = el("div", {class: "tokens"}, ...columns.map(([t, i]) => {
    let begun = false;
    return el("div", {style: "display:grid; gap:2px"}, ...layers.map(l => {
      const s = by.get(`${l}/${i}`), first = s && !begun;
      begun ||= Boolean(s);
      return el("div", {class: `half${first ? " start" : s ? " parted" : ""}`, title: `layer ${l}, position ${i}, ${tokenText(t)}: ${s ? "differs from " + s + " on" : "identical"}`});
    }), word24(t));
  }));
  picture("Where each token parts", `A column a token, a row a layer from the first at the top. Red: the token's first layer that differs; grey: it still does; green: identical.${cut}`, el("div", {class: "scroll"}, grid));
}

