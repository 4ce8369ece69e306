// The dashboard: shows what /api/stats, /api/exchanges and /api/events say. Text is put into the page as text only.
"use strict";

const KEPT = 200;
const RETRY = [1, 2, 5, 10, 15];
const NAMES = new Intl.NumberFormat("en");
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; text stays text. */
function h(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

const state = { stats: null, exchanges: [], older: [], search: "", held: [], waiting: 0, skipped: 0, paused: false, open: null, said: null };

// --- Talking to the proxy ---------------------------------------------------------------------------------------

function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  return fetch(path, { ...options, headers, cache: "no-store" });
}

async function json(path) {
  const answer = await ask(path);
  if (answer.ok) return answer.json();
  const error = new Error((await answer.json().catch(() => ({}))).detail || `${answer.status}`);
  error.status = answer.status;
  throw error;
}

/** Server-sent events by fetch, since EventSource sends no token. */
async function listen(since, onEvent) {
  const answer = await ask(`api/events?since=${since}`);
  if (!answer.ok) {
    const error = new Error((await answer.json().catch(() => ({}))).detail || `${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const field = (name) => part.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (field("event")) onEvent(field("event"), JSON.parse(field("data")));
    }
  }
}

async function run() {
  for (let failures = 0; ; ) {
    let why = "The proxy does not answer. What is shown is from before.";
    try {
      const [stats, { exchanges, count }] = await Promise.all([json("api/stats"), json(`api/exchanges?limit=${KEPT}`)]);
      state.stats = stats;
      state.exchanges = exchanges;
      state.held = [];
      state.waiting = 0;
      state.said = null;
      $("token").hidden = true;
      state.search = "";
      failures = 0;
      await search();
      await follow();
      await listen(count, (name, data) => {
        if (name === "stats") { state.stats = data; renderStats(); }
        if (name === "skipped") { state.skipped += data; renderCount(); }
        if (name === "exchange") arrived(data);
      });
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        health("idle", "Not allowed");
        notice(error.message);
        $("token").hidden = error.status !== 401;
        if (error.status === 401) await new Promise((done) => $("token").addEventListener("submit", done, { once: true }));
        else return;
        continue;
      }
      why = error.status ? error.message : why;
    }
    const wait = RETRY[Math.min(failures++, RETRY.length - 1)];
    for (let left = wait; left > 0; left--) {
      health("idle", "Disconnected");
      notice(`${why} Trying again in ${left} s.`);
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}

$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", new FormData($("token")).get("token"));
  $("token").reset();
  $("token").hidden = true;
  notice(null);
});

// --- Is it working? ---------------------------------------------------------------------------------------------

function health(kind, text) {
  $("health").className = `pill ${kind}`;
  if ($("health").textContent !== text) $("health").textContent = text;
}

/** Says something until it is taken back, whatever else there is to say. */
function notice(text) {
  state.said = text;
  renderNotice();
}

function renderNotice() {
  const now = state.stats?.state ?? {};
  const words = [
    state.said,
    now.audit?.fault && `The audit trail: ${now.audit.fault}.`,
    now.audit_lost > 0 && `${NAMES.format(now.audit_lost)} lines are lost to the audit trail.`,
    now.journal_dropped > 0 && `${NAMES.format(now.journal_dropped)} exchanges are missing here: there were too many at once.`,
    now.config_fault && "The configuration was not reloaded: the log says why. The last good one is in force.",
  ].filter(Boolean).join(" ");
  $("notice").hidden = !words;
  if ($("notice").textContent !== words) $("notice").textContent = words;
}

function renderStats() {
  const { totals, state: now, minutes, applications } = state.stats;
  const reached = totals.refused + totals.exhausted;
  if (now.draining) health("warn", "Draining");
  else if (now.mode === "off") health("warn", "Not looking");
  else if (totals.exhausted > 0) health("warn", "Some refusals got through");
  else if (totals.requests === 0) health("idle", "Waiting for requests");
  else health("good", "Working");
  $("route").textContent = `${now.address} → ${now.upstream}`;
  document.title = reached ? `(${reached}) optin-proxy` : "optin-proxy";

  renderNotice();

  $("mode").disabled = false;
  if (!$("mode").dataset.busy) $("mode").querySelector(`[value="${now.mode}"]`).checked = true;

  const tile = (name, value, note, classes = "") =>
    h("div", { class: `tile ${classes}` },
      h("dt", {}, name, h("span", { class: "note" }, note)), h("dd", {}, NAMES.format(value)));
  $("tiles").replaceChildren(
    tile("Refusals that reached a client", reached,
      reached === 0 ? "Nobody was told of a transition that is not allowed."
        : `${NAMES.format(totals.refused)} true of what was sent, ${NAMES.format(totals.exhausted)} not, and no attempt left.`,
      `lead ${reached === 0 ? "good" : "bad"}`),
    tile("Requests", totals.requests, `${NAMES.format(totals.writes)} contact writes`),
    tile("Rewritten", totals.rewritten, `${NAMES.format(totals.findings)} findings`),
    tile("Rescued", totals.rescued, "refused, then accepted"),
    tile("Not inspected", totals.uninspected, "passed on as they came"),
    tile("Own errors", totals.problems, "the proxy answered itself"),
  );
  renderPlots(minutes);
  renderApplications(applications);
}

// --- What it did ------------------------------------------------------------------------------------------------

function renderPlots(minutes) {
  const end = Math.floor(new Date(state.stats.now).getTime() / 60000);
  const series = [
    ["Bodies rewritten", "rewritten", (it) => it.rewritten],
    ["Rescued by retry", "rescued", (it) => it.rescued],
    ["Refusals that reached a client", "reached", (it) => it.refused + it.exhausted],
  ];
  $("plots").replaceChildren(...series.map(([title, name, of]) => {
    const values = Array.from({ length: 60 }, () => 0);
    for (const it of minutes) {
      const position = 59 - (end - it.minute);
      if (position >= 0 && position < 60) values[position] = of(it);
    }
    const most = Math.max(...values, 1);
    const sum = values.reduce((a, b) => a + b, 0);
    const bars = values.map((value, position) => value > 0 && h("rect", {
      class: name, x: position * 10 + 1, y: 100 - Math.max(value / most * 96, 3), width: 8, height: Math.max(value / most * 96, 3), rx: 1.5,
    }, h("title", {}, `${value} at ${clock((end - 59 + position) * 60000, false)}`)));
    return h("figure", { class: "plot" },
      h("figcaption", {}, title, h("b", {}, NAMES.format(sum))),
      h("svg", { viewBox: "0 0 600 102", preserveAspectRatio: "none", role: "img",
        "aria-label": `${title}, by minute over the last hour: ${sum} in all, at most ${Math.max(...values)} in a minute` },
        h("line", { class: "axis", x1: 0, x2: 600, y1: 101, y2: 101, "vector-effect": "non-scaling-stroke" }), bars),
      h("div", { class: "scale", "aria-hidden": "true" }, h("span", {}, "60 min ago"),
        h("span", {}, `at most ${Math.max(...values)} a minute`), h("span", {}, "now")));
  }));
}

// --- Who sends mismatches ---------------------------------------------------------------------------------------

function renderApplications(applications) {
  const sending = applications.filter((it) => it.kinds.length > 0);
  if (sending.length === 0) {
    const writes = state.stats.totals.writes > 0;
    $("applications").replaceChildren(h("p", { class: "nothing" }, writes
      ? "Nobody. Every contact write so far was consistent."
      : "No contact write has come through yet."));
    return;
  }
  const rows = sending.flatMap((application) => application.kinds.map((it, position) => h("tr", {},
    position === 0 && h("th", { scope: "rowgroup", rowspan: application.kinds.length }, application.user_agent,
      h("span", { class: "quiet" }, `${NAMES.format(application.totals.writes)} contact writes`)),
    h("td", { class: "kind" }, it.kind),
    h("td", { class: "number", "data-label": "found" }, NAMES.format(it.findings)),
    h("td", { class: "number", "data-label": "changed" }, NAMES.format(it.changed)),
    h("td", { class: "cause" }, it.cause, " ", h("a", { href: `#exchange/${it.request_id}` }, "Example")),
    position === 0 && h("td", { class: "lists quiet", rowspan: application.kinds.length },
      application.lists.slice(0, 6).map((list) => `${list.list_id} (${NAMES.format(list.findings)})`).join(", ")
        + (application.lists.length > 6 ? ` and ${application.lists.length - 6} more` : "")))));
  const heads = [["Application"], ["Finding"], ["Found", "number"], ["Changed", "number"], ["Likely cause"], ["Lists (findings)"]];
  $("applications").replaceChildren(h("div", { class: "sheet" }, h("table", {},
    h("thead", {}, h("tr", {}, heads.map(([text, name]) => h("th", { scope: "col", class: name }, text)))),
    h("tbody", {}, rows))));
}

// --- Exchanges --------------------------------------------------------------------------------------------------

const BADGES = {
  rewritten: "accent", rescued: "good", refused: "bad", exhausted: "bad", observed: "warn", uninspected: "warn", clean: "plain",
};

function clock(time, seconds = true) {
  return new Date(time).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: seconds ? "2-digit" : undefined });
}

function shown(exchange) {
  const { outcome, kind, text } = Object.fromEntries(new FormData($("filter")));
  const is = exchange.outcome && exchange.outcome !== "no_contact" ? exchange.outcome : "none";
  if (outcome === "write" ? is === "none" : outcome && outcome !== is) return false;
  if (kind && !exchange.findings.some((it) => it.kind === kind)) return false;
  if (!text) return true;
  const all = [exchange.request_id, exchange.account, exchange.contact_id, exchange.user_agent, exchange.route,
    exchange.authority, exchange.status, ...exchange.findings.map((it) => it.list_id)];
  return all.some((it) => it != null && String(it).toLowerCase().includes(text.toLowerCase()));
}

/** All that are at hand, the newest first. */
function known() {
  const at = new Set(state.exchanges.map((it) => it.seq));
  return [...state.exchanges, ...state.older.filter((it) => !at.has(it.seq))].sort((one, other) => other.seq - one.seq);
}

/** Shows what the filter asks for: of those at hand at once, and then, where it names an outcome or a kind, of all that the proxy has kept. */
async function search() {
  const { outcome, kind } = Object.fromEntries(new FormData($("filter")));
  const asked = new URLSearchParams({ ...(outcome in BADGES && { outcome }), ...(kind && { kind }) }).toString();
  const isNew = asked !== state.search;
  if (isNew) state.older = [];
  state.search = asked;
  if (state.stats) render();
  if (!isNew || !asked) return;
  try {
    const { exchanges } = await json(`api/exchanges?limit=${KEPT}&${asked}`);
    if (asked !== state.search) return;
    state.older = exchanges;
    render();
  } catch (error) {
    state.search = "";
    notice(error.message);
  }
}

function arrived(exchange) {
  if (state.paused) {
    state.waiting++;
    state.held = [exchange, ...state.held].slice(0, KEPT);
    renderCount();
    return;
  }
  keep([exchange, ...state.exchanges]);
  if ($("empty")) return render();
  if (shown(exchange)) {
    const item = entry(exchange);
    item.classList.add("fresh");
    $("exchanges").prepend(item);
    const at = new Set(known().map(place));
    for (const old of [...$("exchanges").children].slice(KEPT - 1)) if (!at.has(old.id)) old.remove();
  }
  renderCount();
}

/** Keeps the newest ones, and the one that is open. */
function keep(exchanges) {
  state.exchanges = exchanges.filter((it, position) => position < KEPT || it.request_id === state.open);
}

/** Clients may use an id twice: the number is what tells exchanges apart. */
function place(exchange) {
  return `exchange-${exchange.seq}`;
}

function renderCount() {
  const all = state.exchanges.length;
  const visible = $("exchanges").children.length;
  const total = state.stats?.totals.requests ?? 0;
  const parts = [];
  if (state.search && !new FormData($("filter")).get("text")) parts.push(`The newest ${visible} that match, of all that are kept.`);
  else if (all > 0) parts.push(visible === all ? `The last ${NAMES.format(all)} of ${NAMES.format(Math.max(total, all))}.` : `${visible} of the last ${known().length} match.`);
  if (state.paused) parts.push(`Paused; ${state.waiting} new.`);
  if (state.skipped) parts.push(`${NAMES.format(state.skipped)} were too many at once to be listed; all are counted.`);
  $("count").textContent = parts.join(" ");
}

function render() {
  renderStats();
  const visible = known().filter(shown);
  $("exchanges").replaceChildren(...visible.map(entry));
  $("empty")?.remove();
  if (state.exchanges.length === 0) {
    const address = state.stats.state.address;
    $("exchanges").after(h("div", { id: "empty", class: "nothing" },
      h("p", {}, "No request has come through yet. Give the application this address as the API's base URL, or send one by hand:"),
      h("pre", {}, `curl -i http://${address}/ws/customers/ACCOUNT/contacts`)));
  } else if (visible.length === 0) {
    $("exchanges").after(h("p", { id: "empty", class: "nothing" }, "None of the exchanges that are kept here match the filter."));
  }
  renderCount();
}

function entry(exchange) {
  const { request_id: id, outcome } = exchange;
  const inspected = outcome && outcome !== "no_contact";
  const open = state.open === id && known().find((it) => it.request_id === id) === exchange;
  const where = [exchange.account, exchange.contact_id && `contact ${exchange.contact_id}`].filter(Boolean).join(", ") || exchange.authority || "";
  const what = exchange.found === 0 ? "" : exchange.found === 1 ? exchange.findings[0].kind : `${exchange.found} findings`;
  return h("li", { id: place(exchange) },
    h("a", { class: "row", href: open ? "#" : `#exchange/${id}`, "aria-expanded": String(open) },
      h("time", { datetime: exchange.time }, clock(exchange.time)),
      h("span", { class: `badge ${inspected ? BADGES[outcome] : exchange.problem ? "bad" : "plain"}` }, inspected ? outcome : exchange.problem ? "error" : "passed on"),
      h("span", { class: "what" }, `${exchange.method} ${where || exchange.route} `,
        h("small", {}, [what, exchange.user_agent, exchange.reason ?? exchange.problem].filter(Boolean).join(" · "))),
      h("span", { class: "end" }, `${exchange.attempts > 1 ? `${exchange.attempts} attempts · ` : ""}${exchange.status ?? "client gone"} · ${exchange.duration_ms.toFixed(exchange.duration_ms < 10 ? 1 : 0)} ms`)),
    open && detail(exchange));
}

function detail(exchange) {
  const fact = (name, value) => value != null && value !== "" && h("div", {}, h("dt", {}, name), h("dd", {}, String(value)));
  return h("div", { class: "detail" },
    h("dl", { class: "facts" },
      fact("Began", new Date(exchange.time).toLocaleString("en-GB")), fact("Request id", exchange.request_id), fact("Trace", exchange.trace_id),
      fact("Route", `${exchange.method} ${exchange.route}`), fact("Account", exchange.account), fact("Contact", exchange.contact_id),
      fact("Target", exchange.authority && `${exchange.authority} (${exchange.decision})`),
      fact("Application", exchange.user_agent), fact("Status", exchange.status ?? "none: the client was gone"),
      fact("Attempts", exchange.attempts), fact("Refusals", exchange.verdicts.join(", ")),
      fact("Not inspected", exchange.reason), fact("Error", exchange.problem), fact("Answer", exchange.complete ? null : "broke off")),
    exchange.findings.length > 0 && diff(exchange));
}

/** What stood in the OptInSource nodes and ids, and what stands there now. */
function diff(exchange) {
  const line = (mark, text, name) => h("span", { class: name }, `${mark} ${text}`);
  const node = (value) => value === "" ? "<OptInSource/>" : `<OptInSource>${value}</OptInSource>`;
  const lines = exchange.findings.flatMap((it) => {
    const own = it.kind === "own_origin";
    const place = it.list_id ? `ContactList ${it.list_id}` : "Contact";
    const said = it.declared && !own ? `, which declares ${it.declared}` : "";
    const before = own ? `id="${it.was}/…"` : it.was === "(several)" ? "contradicting OptInSources" : it.was === "" && it.kind === "undeclared" ? null : node(it.was);
    const after = own ? `id="${it.now}/…"` : it.now === "removed" ? null : node(it.now);
    return [
      line(" ", `${it.kind} in ${place}${it.list_id && said ? ` of a Contact${said}` : ""}   ${it.setting}`, "why"),
      it.changed ? before && line("-", before, "minus") : line(" ", before ?? "no OptInSource"),
      it.changed && after && line("+", after, "plus"),
    ];
  });
  const more = exchange.found - exchange.findings.length;
  return h("pre", { class: "diff", tabindex: "0", role: "region", "aria-label": "Before and after" }, lines,
    more > 0 && line(" ", `and ${more} more`, "why"));
}

/** Opens what the address names; fetches it if it is not among those at hand. */
async function follow() {
  const id = location.hash.startsWith("#exchange/") ? location.hash.slice(10) : null;
  if (id === state.open) return;
  state.open = id;
  notice(null);
  if (id && !state.exchanges.some((it) => it.request_id === id)) {
    try {
      state.exchanges.push(await json(`api/exchanges/${encodeURIComponent(id)}`));
    } catch (error) {
      notice(error.message);
      state.open = null;
    }
  }
  const focused = document.activeElement?.closest("li")?.id;
  render();
  const opened = state.open && state.exchanges.find((it) => it.request_id === id);
  const item = opened && document.getElementById(place(opened));
  if (item) {
    item.scrollIntoView({ block: "nearest" });
    item.querySelector(".row").focus({ preventScroll: true });
  } else if (focused) {
    document.getElementById(focused)?.querySelector(".row").focus();
  }
}

addEventListener("hashchange", follow);
$("filter").addEventListener("input", search);
$("filter").addEventListener("submit", (event) => event.preventDefault());
$("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", String(state.paused));
  $("pause").textContent = state.paused ? "Go on" : "Pause";
  if (!state.paused) {
    keep([...state.held, ...state.exchanges]);
    state.held = [];
    state.waiting = 0;
    render();
  }
  renderCount();
});

$("mode").addEventListener("change", async (event) => {
  const mode = event.target.value;
  const words = { enforce: "Mismatches will be reported and mended.", observe: "Mismatches will be reported, and bodies left as they are.", off: "Bodies will not be looked at, and refusals will not be retried." };
  $("mode").dataset.busy = "yes";
  try {
    if (!confirm(`${words[mode]} Until the configuration is next reloaded. Go on?`)) return;
    const answer = await ask("mode", { method: "PUT", body: mode });
    if (answer.status === 401) { $("token").hidden = false; $("token").querySelector("input").focus(); }
    if (!answer.ok) notice((await answer.json()).detail);
    else state.stats.state.mode = mode;
  } catch {
    notice("The proxy does not answer: the mode is what it was.");
  } finally {
    delete $("mode").dataset.busy;
    $("mode").querySelector(`[value="${state.stats.state.mode}"]`).checked = true;
  }
});

run();
