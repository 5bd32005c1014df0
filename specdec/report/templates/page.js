"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const color = (index) => (index === null ? "var(--neutral)" : `var(--c${index % 12})`);
  const dot = (index) => make("i", { class: index > 11 ? "dot again" : "dot", style: `--color: ${color(index)}` });
  const words = (text) => text.replaceAll("_", " ");
  const options = (select, names) => select.append(...names.map(([value, text]) => make("option", { value }, text)));

  // Colour scheme: the system's, unless the reader picks one.
  const schemes = ["auto", "light", "dark"];
  let scheme = 0;
  const showScheme = () => {
    if (scheme) document.documentElement.dataset.theme = schemes[scheme];
    else delete document.documentElement.dataset.theme;
    $("#scheme span").textContent = `${["◐", "☀", "☾"][scheme]} ${schemes[scheme]}`;
  };
  $("#scheme").addEventListener("click", () => {
    scheme = (scheme + 1) % schemes.length;
    showScheme();
  });
  showScheme();

  // Settings: one at a time. The section links lead into the one that is shown.
  const settings = $$(".setting");
  let current = 0;
  const shown = (name) => $(`[data-name="${name}"]`, settings[current]) || document.getElementById(name);
  const showSetting = (index) => {
    current = index;
    settings.forEach((element, i) => (element.hidden = i !== index));
    $$("nav.sections a").forEach((link) => (link.hidden = !shown(link.hash.slice(1)) || shown(link.hash.slice(1)).closest("[hidden]")));
  };
  $$('input[name="setting"]').forEach((input) => input.addEventListener("change", () => showSetting(Number(input.value))));
  showSetting(0);
  $$("nav.sections a").forEach((link) =>
    link.addEventListener("click", (event) => {
      event.preventDefault();
      shown(link.hash.slice(1)).scrollIntoView();
    })
  );
  const here = () => {
    const links = $$("nav.sections a").filter((link) => !link.hidden);
    const passed = links.filter((link) => shown(link.hash.slice(1)).getBoundingClientRect().top < innerHeight * 0.35);
    links.forEach((link) => link.classList.toggle("here", link === (passed.at(-1) || links[0])));
  };
  addEventListener("scroll", here, { passive: true });
  here();

  // All figures.
  const data = JSON.parse($("#row-data").textContent);
  const keys = ["method", "color", "setting", "task", "subset", "state", ...data.columns];
  const rows = data.rows.map((values) => Object.fromEntries(values.map((value, i) => [keys[i], value])));
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const times = (value) => `${value.toFixed(2)}×`;
  const columns = {
    method: ["method"], setting: ["setting"], task: ["task"], subset: ["rows taken"], state: ["state"],
    speedup_vs_plain: ["speed-up vs plain", times], speedup_vs_transformers: ["vs transformers", times],
    tokens_per_second: ["tokens / s", (v) => v.toFixed(1)], mean_accepted_tokens: ["tokens / pass", (v) => v.toFixed(2)],
    draft_share: ["draft share", percent], tree_nodes: ["nodes / pass", (v) => v.toFixed(1)],
    looping_share: ["looping", percent], rows: ["rows", String], identical_rows: ["identical", String],
    near_ties: ["near-ties", String], bugs: ["bugs", String], failed: ["failed", String], skipped: ["skipped", String],
  };
  const severalSettings = new Set(rows.map((row) => row.setting)).size > 1;
  if (!severalSettings) delete columns.setting;
  const names = { non_looping: "not looping", all: "all", overall: "all tasks" };
  const distinct = (key) => [...new Set(rows.map((row) => row[key]))];
  const rowFilters = $("#row-filters");
  for (const key of ["method", "setting", "task", "subset", "state"]) {
    if (distinct(key).length < 2) continue;
    const select = make("select", { name: key });
    options(select, [["", "any"], ...distinct(key).map((value) => [value, names[value] && key !== "state" ? names[value] : words(value)])]);
    if (key === "task" && distinct(key).includes("overall")) select.value = "overall";
    rowFilters.append(make("label", {}, columns[key][0], select));
  }
  let sorting = ["speedup_vs_plain", -1];
  const head = $("#rows thead"), body = $("#rows tbody");
  const drawRows = () => {
    const wanted = [...new FormData(rowFilters)].filter(([, value]) => value !== "");
    const kept = rows.filter((row) => wanted.every(([key, value]) => row[key] === value));
    const [key, direction] = sorting;
    const rank = (row) => row[key] ?? (typeof rows.find((r) => r[key] !== null)?.[key] === "number" ? -Infinity : "");
    kept.sort((a, b) => (rank(a) < rank(b) ? -1 : rank(a) > rank(b) ? 1 : 0) * direction);
    head.replaceChildren(make("tr", {}, ...Object.entries(columns).map(([name, [title, show]]) => {
      const button = make("button", { type: "button" }, title);
      button.addEventListener("click", () => {
        sorting = [name, sorting[0] === name ? -sorting[1] : show ? -1 : 1];
        drawRows();
      });
      const sorted = name === key ? (direction < 0 ? "descending" : "ascending") : "none";
      return make("th", { scope: "col", class: show ? "n" : "", "aria-sort": sorted }, button);
    })));
    body.replaceChildren(...kept.map((row) => make("tr", {}, ...Object.entries(columns).map(([name, [, show]]) => {
      if (name === "method") return make("th", { scope: "row" }, dot(row.color), row.method);
      if (!show) return make("td", {}, name === "state" && row.state === "all" ? "–" : names[row[name]] || words(row[name]));
      return make("td", { class: "n" }, row[name] === null ? "–" : show(row[name]));
    }))));
    $("#row-count").textContent = `${kept.length} of ${rows.length} rows`;
  };
  rowFilters.addEventListener("input", drawRows);
  rowFilters.addEventListener("submit", (event) => event.preventDefault());
  drawRows();

  // Answers: unpacked once, drawn a page at a time.
  const unpack = async () => {
    const bytes = Uint8Array.from(atob($("#answer-data").textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const PER_PAGE = 10;
  const start = (book) => {
    const form = $("#answer-filters"), list = $("#answer-list"), status = $("#answer-count"), pager = $("#pager");
    const texts = book.texts.map((pieces) => pieces.join(""));
    const lower = texts.map((text) => text.toLowerCase());
    const field = (name) => form.elements[name];
    let page = 0;
    options(field("method"), book.methods.map((method, i) => [i, method.label + (method.setting ? ` · ${method.setting}` : "") ]));
    options(field("category"), [["", "all categories"], ...[...new Set(book.questions.map((q) => q.category))].map((name) => [name, words(name)])]);
    const first = book.methods.findIndex((method) => method.kind === "drafter");
    field("method").value = String(Math.max(first, 0));

    const failed = (answer) => answer.e !== undefined || answer.k !== undefined;
    const matches = (answer, question, wanted) => {
      if (wanted.category && question.category !== wanted.category) return false;
      if (wanted.verdict === "failed" && !failed(answer)) return false;
      if (wanted.verdict === "looping" && !(answer.l || []).some(Boolean)) return false;
      if (["identical", "near_tie", "bug"].includes(wanted.verdict)) {
        const verdicts = (answer.v || []).filter(Boolean);
        if (wanted.verdict === "identical" ? !verdicts.length || verdicts.some((v) => v !== "identical") : !verdicts.includes(wanted.verdict)) return false;
      }
      if (!wanted.search) return true;
      const inText = (answer.t || []).some((text) => lower[text].includes(wanted.search));
      const inPrompt = (question.turns || []).some((text) => text.toLowerCase().includes(wanted.search));
      return inText || inPrompt || String(question.id) === wanted.search || (answer.e || "").toLowerCase().includes(wanted.search);
    };

    const tokens = (text, sources, divergence) => {
      const box = make("div", { class: "tokens" });
      book.texts[text].forEach((piece, i) => {
        const source = book.sources[sources.charCodeAt(i) - 48];
        const kind = source.name === "target" || source.name === "not recorded" ? "own" : source.name === "prefill" ? "pre" : "drafted";
        const span = make("span", { class: kind + (i === divergence ? " differs" : ""), title: source.name }, piece);
        if (kind === "drafted") span.style.setProperty("--color", color(source.color));
        box.append(span);
      });
      return box;
    };
    const divergence = (mine, plain) => {
      const a = book.texts[mine], b = book.texts[plain];
      const at = a.findIndex((piece, i) => piece !== b[i]);
      return mine === plain ? -1 : at;
    };
    const verdictNames = { identical: "identical to plain", near_tie: "near-tie", bug: "bug" };
    const turn = (answer, plain, index, beside, lossless) => {
      const facts = make("p", { class: "turn-facts" });
      const say = (text) => facts.append(make("span", {}, text));
      if (answer.t.length > 1) say(`turn ${index + 1}`);
      if (answer.n[index] !== undefined) say(`${answer.n[index]} tokens`);
      if (answer.p[index] !== undefined) say(`${answer.p[index]} passes`);
      if (answer.w[index] !== undefined) say(`${answer.w[index].toFixed(2)} s`);
      const verdict = answer.v[index];
      if (verdict) facts.append(make("span", { class: `badge ${lossless ? verdict : "lossy"}` }, lossless ? verdictNames[verdict] : verdict === "identical" ? "identical to plain" : "differs by design"));
      if (answer.l[index]) facts.append(make("span", { class: "badge" }, "looping"));
      const other = plain && plain.t ? plain.t[index] : undefined;
      const at = other === undefined || !beside ? -1 : divergence(answer.t[index], other);
      const columns = make("div", { class: `beside${beside ? " two" : ""}` }, make("div", {}, tokens(answer.t[index], answer.s[index], at)));
      if (beside) {
        const text = other === undefined ? make("p", { class: "empty" }, "no plain answer") : tokens(other, plain.s[index], at);
        if (other !== undefined) text.classList.add("plain-text");
        columns.firstChild.prepend(make("h4", {}, "speculative"));
        columns.append(make("div", {}, make("h4", {}, "plain"), text));
      }
      return [facts, columns];
    };
    const card = (number, method, beside) => {
      const question = book.questions[number], answer = book.answers[method][number];
      const plain = book.methods[method].plain === null ? undefined : book.answers[book.methods[method].plain][number];
      const box = make("article", { class: "card" }, make("header", {}, make("h3", {}, `Question ${question.id}`), make("span", { class: "muted" }, words(question.category))));
      if (answer.e !== undefined) {
        $("header", box).append(make("span", { class: "badge failed" }, "failed"));
        box.append(make("pre", {}, answer.e));
      }
      for (const reason of answer.k || []) box.append(make("p", { class: "turn-facts" }, make("span", { class: "badge" }, "skipped"), reason));
      (answer.t || []).forEach((_, index) => {
        if (question.turns && question.turns[index]) box.append(make("div", { class: "prompt" }, question.turns[index]));
        box.append(...turn(answer, plain, index, beside, book.methods[method].lossless));
      });
      return box;
    };
    const drawLegend = (kept, method) => {
      const used = new Set(kept.flatMap((number) => (book.answers[method][number].s || []).flatMap((s) => [...new Set(s)])));
      $("#legend").replaceChildren(...book.sources.flatMap((source, i) => {
        if (!used.has(String.fromCharCode(48 + i))) return [];
        const label = { target: "the target's own token of a pass", prefill: "the prompt's pass" }[source.name] || `proposed by ${source.name}`;
        const sample = make("span", { class: source.color === null ? "" : "swatch", style: `--color: ${color(source.color)}${source.name === "prefill" ? "; font-style: italic" : ""}` }, "abc");
        return [make("span", {}, sample, ` ${label}`)];
      }));
    };
    const draw = () => {
      const method = Number(field("method").value);
      const wanted = { category: field("category").value, verdict: field("verdict").value, search: field("search").value.trim().toLowerCase() };
      const kept = Object.keys(book.answers[method] || {}).map(Number).filter((number) => matches(book.answers[method][number], book.questions[number], wanted));
      const pages = Math.max(Math.ceil(kept.length / PER_PAGE), 1);
      page = Math.min(page, pages - 1);
      const visible = kept.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
      list.replaceChildren(...visible.map((number) => card(number, method, field("beside").checked)));
      drawLegend(visible, method);
      status.textContent = `${kept.length} of ${Object.keys(book.answers[method] || {}).length} answers`;
      const step = (text, by) => {
        const button = make("button", { type: "button" }, text);
        button.disabled = page + by < 0 || page + by >= pages;
        button.addEventListener("click", () => {
          page += by;
          draw();
          $("#answers").scrollIntoView();
        });
        return button;
      };
      pager.replaceChildren(...(pages > 1 ? [step("Previous", -1), `${page + 1} of ${pages}`, step("Next", 1)] : []));
    };
    form.addEventListener("input", () => {
      page = 0;
      draw();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    draw();
    document.documentElement.dataset.ready = "true";
  };
  unpack().then(start, (error) => {
    $("#answer-count").textContent = `The answers could not be unpacked: ${error}`;
    throw error;
  });
})();
