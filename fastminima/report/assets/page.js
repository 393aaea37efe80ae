// Draws the figures, in the look that the reader has chosen, and follows a live run.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const button = document.getElementById("look");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = {
    displaylogo: false,
    responsive: true,
    // By name: others send the chart to a server.
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
  };
  const linear = new Set();  // figures whose axis the reader made linear
  let chosen = null;         // the look, once the reader has chosen one

  const isDark = () => (chosen === null ? prefersDark.matches : chosen === "dark");

  // Colours come from the style sheet: a figure says "var(--blue)".
  const painted = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) {
      const isPlain = value.length && typeof value[0] !== "object";
      return isPlain ? value : value.map((v) => painted(v, style));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([k, v]) => [k, painted(v, style)]));
    }
    return value;
  };

  const isNarrow = () => root.clientWidth < 600;

  const shown = (id) => {
    const spec = painted(data.figures[id], getComputedStyle(root));
    for (const [name, axis] of Object.entries(spec.layout)) {
      if (linear.has(id) && name.startsWith("yaxis") && axis.type === "log") {
        axis.type = "linear";
        delete axis.range;
      }
      if (isNarrow() && name.startsWith("yaxis")) axis.tickfont = { size: 10 };
    }
    const title = spec.layout.xaxis.title;
    if (title) title.standoff = 6;
    return spec;
  };

  const places = () => [...document.querySelectorAll(".plot")];

  const draw = (place) => {
    const spec = shown(place.dataset.figure);
    return Plotly.react(place, spec.data, spec.layout, config);
  };

  const drawAll = async () => {
    for (const place of places()) {
      await draw(place);
      if (!place.dataset.ready) prepare(place);
    }
    root.dataset.drawn = String(places().length);
  };

  // The axis is switched by a button, and arrow keys go through the steps.
  const prepare = (place) => {
    place.dataset.ready = "yes";
    const id = place.dataset.figure;
    const layout = data.figures[id].layout;
    const isLog = Object.entries(layout).some(
      ([name, axis]) => name.startsWith("yaxis") && axis.type === "log");
    const isMap = data.figures[id].data[0].type === "heatmap";
    if (isLog && !isMap) addSwitch(place, id);
    place.addEventListener("keydown", (event) => move(event, place));
    place.addEventListener("blur", () => {
      Plotly.Fx.unhover(place);
      place.nextElementSibling.textContent = "";
    });
    place.on("plotly_relayout", (change) => follow(change, place));
  };

  const addSwitch = (place, id) => {
    const toggle = document.createElement("button");
    toggle.type = "button";
    toggle.textContent = "Linear axis";
    toggle.setAttribute("aria-pressed", "false");
    const title = place.parentElement.querySelector("h3");
    toggle.setAttribute("aria-label", `Linear axis: ${title.textContent}`);
    toggle.addEventListener("click", () => {
      if (!linear.delete(id)) linear.add(id);
      toggle.setAttribute("aria-pressed", String(linear.has(id)));
      toggle.textContent = linear.has(id) ? "Logarithmic axis" : "Linear axis";
      toggle.setAttribute("aria-label", `${toggle.textContent}: ${title.textContent}`);
      draw(place);
    });
    title.after(toggle);
  };

  // Steps of the figure, each once; what stands at one of them is said aloud.
  const stepsOf = (place) => {
    const found = new Set();
    for (const trace of place.data) {
      if (trace.fill !== "toself") for (const x of trace.x) if (x !== null) found.add(x);
    }
    return [...found].sort((a, b) => a - b);
  };

  const move = (event, place) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20,
                 Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || event.target !== place) return;
    event.preventDefault();
    const steps = stepsOf(place);
    if (!steps.length) return;
    const last = steps.length - 1;
    const at = Number(place.dataset.at ?? (by > 0 ? -1 : last + 1));
    const next = Math.min(Math.max(at + by, 0), last);
    place.dataset.at = String(next);
    say(place, steps[next]);
  };

  const short = (y) => (typeof y === "number" ? Number(y.toPrecision(4)).toString() : y);

  const say = (place, step) => {
    const points = [];
    const words = [];
    place.data.forEach((trace, curveNumber) => {
      if (trace.fill === "toself") return;
      const pointNumber = trace.x.lastIndexOf(step);
      if (pointNumber < 0) return;
      if (trace.type === "heatmap") {
        trace.z.forEach((row, y) => {
          const name = trace.customdata ? trace.customdata[y][0] : short(trace.y[y]);
          if (trace.text[y][pointNumber]) words.push(`${name} ${trace.text[y][pointNumber]}`);
        });
      } else {
        points.push({ curveNumber, pointNumber });
        if (trace.showlegend !== false && trace.y[pointNumber] !== null) {
          words.push(`${trace.name} ${short(trace.y[pointNumber])}`);
        }
      }
    });
    if (points.length) Plotly.Fx.hover(place, points);
    place.nextElementSibling.textContent = `Step ${step}: ${words.join(", ")}`;
  };

  // Zooming into steps in one figure does so in all.
  let following = false;
  const follow = async (change, source) => {
    const range = ["xaxis.range[0]", "xaxis.range[1]"].map((key) => change[key]);
    const whole = data.figures[source.dataset.figure].layout.xaxis.range;
    const isReset = change["xaxis.autorange"] === true;
    if (following || (range[0] === undefined && !isReset)) return;
    following = true;
    const update = { "xaxis.range": isReset ? [...whole] : range };
    for (const place of places()) {
      if (place !== source && place.dataset.ready) await Plotly.relayout(place, update);
    }
    following = false;
  };

  const dress = () => {
    root.classList.toggle("dark", isDark());
    button.setAttribute("aria-pressed", String(isDark()));
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} look`);
    return drawAll();
  };

  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    dress();
  });
  prefersDark.addEventListener("change", dress);

  // A live page: what changed is replaced where it stands, and nothing else moves.
  const main = document.getElementById("main");
  const update = (news) => {
    data.figures = news.figures;
    for (const section of news.sections) {
      const fresh = document.createElement("section");
      fresh.id = section.id;
      fresh.setAttribute("aria-labelledby", `${section.id}-title`);
      fresh.innerHTML = section.html;
      const old = document.getElementById(section.id);
      const ids = (s) => [...s.querySelectorAll(".plot")].map((p) => p.dataset.figure).join();
      if (old && ids(old) === ids(fresh)) {
        const text = old.querySelector("[data-text]");
        const newer = fresh.querySelector("[data-text]");
        if (text && newer && text.innerHTML !== newer.innerHTML) text.replaceChildren(...newer.childNodes);
      } else if (old) {
        old.replaceWith(fresh);
      } else {
        const order = news.sections.map((s) => s.id);
        const after = [...main.children].find(
          (child) => order.indexOf(child.id) > order.indexOf(section.id));
        main.insertBefore(fresh, after || null);
      }
    }
    const list = document.querySelector("nav ul");
    list.replaceChildren(...news.sections.map((section) => {
      const known = list.querySelector(`a[href="#${section.id}"]`);
      if (known) return known.parentElement;
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = `#${section.id}`;
      link.textContent = section.title;
      item.append(link);
      return item;
    }));
    return drawAll();
  };

  let version = -1;
  const live = document.getElementById("live");
  const poll = async () => {
    try {
      const reply = await fetch(`data.json?${version}`);
      const news = await reply.json();
      if (news.figures) await update(news);
      version = news.version;
      if (live.textContent !== "live") live.textContent = "live";
      root.dataset.version = String(version);
    } catch (error) {
      live.textContent = "no longer served";
    }
    window.setTimeout(poll, 2000);
  };

  dress().then(() => { if (data.live) poll(); });
})();
