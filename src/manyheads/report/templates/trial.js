"use strict";
(() => {
  const { scores, retrieval, words, tokens, patterns } = JSON.parse(document.getElementById("trial-data").textContent);
  const weights = Uint8Array.from(atob(patterns), (c) => c.charCodeAt(0));
  const layers = scores.length, heads = scores[0].length, perGroup = heads / retrieval[0].length, n = tokens.length;
  const $ = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // One blue scale, light to dark on paper and dark to light on a dark page: readable without telling hues apart.
  const STOPS = {
    light: ["#eef1f4", "#cfe0f1", "#8dbbe2", "#3f86c8", "#0d4f97", "#08264f"],
    dark: ["#222832", "#1d3f63", "#235f9b", "#3f8ed4", "#86c2f5", "#e4f2ff"],
  };
  const hex = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const colour = (value) => {
    const stops = STOPS[dark.matches ? "dark" : "light"].map(hex);
    const place = Math.min(Math.max(value, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (place - low)));
  };
  const css = (rgb) => `rgb(${rgb.join(" ")})`;
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const inkOn = (rgb) => (luminance(rgb) > 0.19 ? "#101418" : "#ffffff");
  const paint = (element, value) => {
    const rgb = colour(value);
    element.style.background = css(rgb);
    element.style.color = inkOn(rgb);
  };
  const top = Math.max(...scores.flat(), 1e-6);
  // Most heads score near zero, a few high: the square root keeps the weak ones apart.
  const shade = (score) => Math.sqrt(Math.max(score, 0) / top);
  const keeps = (layer, head) => retrieval[layer][Math.floor(head / perGroup)];
  const weight = (layer, head, query, key) => weights[((layer * heads + head) * n + query) * n + key] / 255;
  const shown = (token) => (token === undefined ? "" : token.replace(/\n/g, "⏎").trim() || "␣");

  let chosen = [0, 0], query = n - 1, key = 0;
  scores.forEach((row, layer) => row.forEach((score, head) => {
    if (score > scores[chosen[0]][chosen[1]]) chosen = [layer, head];
  }));

  // The head map: one tab stop, arrow keys inside.
  const cells = scores.map((row, layer) => {
    const line = document.createElement("div"), name = document.createElement("span"), groups = document.createElement("div");
    line.className = "row"; line.setAttribute("role", "row");
    name.className = "layer"; name.textContent = layer; name.setAttribute("role", "rowheader"); name.setAttribute("aria-label", `layer ${layer}`);
    groups.className = "groups"; groups.setAttribute("role", "presentation");
    line.append(name, groups);
    let group;
    const made = row.map((score, head) => {
      if (head % perGroup === 0) {
        group = document.createElement("div");
        group.className = keeps(layer, head) ? "group keeps" : "group";
        group.setAttribute("role", "presentation");
        groups.append(group);
      }
      const cell = document.createElement("button");
      cell.type = "button"; cell.className = "cell"; cell.tabIndex = -1;
      cell.dataset.layer = layer; cell.dataset.head = head;
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-label", describe(layer, head).join(", "));
      group.append(cell);
      return cell;
    });
    $("map").append(line);
    return made;
  });

  function describe(layer, head) {
    const state = keeps(layer, head) ? words.kept : words.other;
    return [`Layer ${layer}, head ${head}`, `${words.score} ${scores[layer][head].toFixed(3)}`, perGroup > 1 ? `key/value head ${Math.floor(head / perGroup)} ${state}` : state];
  }

  const tip = $("tip");
  const showTip = (cell) => {
    const [name, ...rest] = describe(+cell.dataset.layer, +cell.dataset.head), box = cell.getBoundingClientRect();
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: name }));
    rest.forEach((text) => tip.append(document.createElement("br"), text));
    tip.hidden = false;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 14 ? box.top - tip.offsetHeight - 9 : box.bottom + 9}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  const cellOf = (event) => event.target.closest(".cell");
  $("map").addEventListener("pointerover", (event) => (cellOf(event) ? showTip(cellOf(event)) : hideTip()));
  $("map").addEventListener("pointerleave", hideTip);
  $("map").addEventListener("focusin", (event) => cellOf(event)?.matches(":focus-visible") && showTip(cellOf(event)));
  $("map").addEventListener("focusout", hideTip);
  addEventListener("scroll", hideTip, { passive: true });
  $("map").addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (cell) choose(+cell.dataset.layer, +cell.dataset.head);
  });
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const clamp = (value, end) => Math.min(Math.max(value, 0), end - 1);
  $("map").addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    choose(clamp(chosen[0] + step[0], layers), clamp(chosen[1] + step[1], heads));
    cells[chosen[0]][chosen[1]].focus();
  });

  function choose(layer, head) {
    const old = cells[chosen[0]][chosen[1]];
    old.setAttribute("aria-selected", "false"); old.tabIndex = -1;
    chosen = [layer, head];
    cells[layer][head].setAttribute("aria-selected", "true"); cells[layer][head].tabIndex = 0;
    const [name, score, state] = describe(layer, head);
    $("head-name").textContent = name;
    let first = 0, near = 0;
    for (let i = 0; i < n; i++) {
      first += weight(layer, head, i, 0) / n;
      for (let j = Math.max(1, i - 3); j <= i; j++) near += weight(layer, head, i, j) / n;
    }
    const percent = (part) => `${Math.round(100 * part)} %`;
    $("head-facts").textContent = `${score}; ${state}. Here ${percent(first)} of its attention rests on the first token, ${percent(near)} on the last four.`;
    draw();
  }

  // The pattern: queries down, keys across.
  const canvas = $("pattern"), context = canvas.getContext("2d");
  const scale = 14;
  canvas.width = canvas.height = n * scale;
  function draw() {
    const [layer, head] = chosen;
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
      context.fillStyle = j > i ? getComputedStyle(document.documentElement).getPropertyValue("--card") : css(colour(Math.sqrt(weight(layer, head, i, j))));
      context.fillRect(j * scale, i * scale, scale, scale);
    }
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ring");
    context.lineWidth = 2;
    context.strokeRect(1, query * scale, (query + 1) * scale - 2, scale - 1);
    context.lineWidth = 4;
    context.strokeRect(key * scale + 1, query * scale, scale - 1, scale - 1);
    canvas.setAttribute("aria-label", `Attention pattern of layer ${layer}, head ${head}: ${n} query tokens down, ${n} key tokens across. Arrow keys move the reading point.`);
    const text = (token) => Object.assign(document.createElement("b"), { textContent: `“${shown(token)}”` });
    const value = weight(layer, head, query, key);
    $("readout").replaceChildren(`Token ${query} `, text(tokens[query]), " gives ", Object.assign(document.createElement("b"), { textContent: `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %` }), ` of its attention to token ${key} `, text(tokens[key]), ".");
    tokenButtons.forEach((button, j) => {
      const rgb = colour(j > query ? 0 : Math.sqrt(weight(layer, head, query, j)));
      const lit = j <= query;
      button.style.background = lit ? css(rgb) : "none";
      button.style.color = lit ? inkOn(rgb) : "inherit";
      button.style.opacity = lit ? 1 : 0.55;
      button.setAttribute("aria-pressed", j === query);
    });
  }
  function strongest() {
    key = 0;
    for (let j = 1; j <= query; j++) if (weight(...chosen, query, j) > weight(...chosen, query, key)) key = j;
  }
  const tokenButtons = tokens.map((token, i) => {
    const button = document.createElement("button");
    button.type = "button"; button.className = "token";
    button.textContent = token.replace(/\n/g, "⏎") || "␣";
    button.addEventListener("click", () => { query = i; strongest(); draw(); });
    $("tokens").append(button);
    return button;
  });
  canvas.addEventListener("pointermove", read);
  canvas.addEventListener("pointerdown", read);
  function read(event) {
    const box = canvas.getBoundingClientRect();
    const i = clamp(Math.floor(((event.clientY - box.top) / box.height) * n), n);
    const j = clamp(Math.floor(((event.clientX - box.left) / box.width) * n), n);
    if (j > i || (i === query && j === key)) return;
    query = i; key = j;
    draw();
  }
  canvas.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    query = clamp(query + step[0], n);
    key = Math.min(clamp(key + step[1], n), query);
    draw();
  });

  function colours() {
    cells.forEach((row, layer) => row.forEach((cell, head) => { cell.style.background = css(colour(shade(scores[layer][head]))); }));
    document.querySelectorAll("td[data-value]").forEach((cell) => paint(cell, +cell.dataset.value));
    $("ramp").style.background = `linear-gradient(90deg, ${STOPS[dark.matches ? "dark" : "light"].join(", ")})`;
    draw();
  }
  $("ramp-top").textContent = top.toFixed(2);
  dark.addEventListener("change", colours);
  strongest();
  choose(...chosen);
  colours();
})();
