// What a person does with the dashboard. Stops at the first surprise.
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const { URL: url, PROXY: proxy, SHOTS: shots, CHROMIUM: executablePath } = process.env;
const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const faults = [];
const foreign = [];

async function open(options = {}, path = "") {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, ...options });
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("request", (request) => request.url().startsWith(url) || request.url().startsWith("data:") || foreign.push(request.url()));
  await page.goto(url + path);
  await page.waitForSelector(".row");
  return page;
}

async function update(contact, body) {
  const answer = await fetch(`${proxy}/ws/customers/joesflowers/contacts/${contact}`, {
    method: "PUT", body,
    headers: { "Content-Type": "application/atom+xml", "User-Agent": "browser-test/1 (jane.roe@example.org)", Authorization: `Basic ${btoa("APIKEY%joesflowers:secret")}` },
  });
  await answer.text();
  return answer;
}

/** Waits until the proxy says that this is its mode. */
async function inForce(mode) {
  for (const end = Date.now() + 3000; ; ) {
    const config = await (await fetch(`${url}config`)).json();
    if (config.sanitize.mode === mode) return;
    assert.ok(Date.now() < end, `the mode is ${config.sanitize.mode}`);
  }
}

const contact = (declared, listed) => `<entry xmlns="http://www.w3.org/2005/Atom"><content><Contact xmlns="http://ws.constantcontact.com/ns/1.0/">
  <EmailAddress>jane.roe@example.org</EmailAddress>${declared}<ContactLists>
  <ContactList id="http://api.constantcontact.com/ws/customers/joesflowers/lists/1">${listed}</ContactList></ContactLists></Contact></content></entry>`;
const source = (value) => `<OptInSource>${value}</OptInSource>`;
const differing = contact(source("ACTION_BY_CONTACT"), source("ACTION_BY_CUSTOMER"));

// The counters move, and a finding is there within a second of its request.
const page = await open();
const requests = page.locator(".tile", { hasText: "Requests" }).locator("dd");
const before = Number(await requests.textContent());
const sent = await update(1, differing);
const row = page.locator(".row", { hasText: "browser-test/1" }).first();
await row.waitFor({ timeout: 1000 });
await page.waitForFunction((count) => Number([...document.querySelectorAll(".tile")].find((it) => it.textContent.includes("Requests")).querySelector("dd").textContent) > count, before, { timeout: 3000 });
assert.equal(await page.locator("#health").textContent(), "Working");

// A diff opens by the keyboard, has its own address, and shows nothing of the contact.
await row.focus();
await page.keyboard.press("Enter");
const diff = page.locator(".diff");
await diff.waitFor();
assert.match(await diff.textContent(), /- <OptInSource>ACTION_BY_CUSTOMER<\/OptInSource>\+ <OptInSource>ACTION_BY_CONTACT<\/OptInSource>/);
const id = sent.headers.get("x-request-id");
assert.ok(page.url().endsWith(`#exchange/${id}`), page.url());
assert.doesNotMatch(await page.textContent("body"), /jane\.roe|example\.org/);
const linked = await open({}, `#exchange/${id}`);
await linked.waitForSelector(".diff");
await linked.close();

// The table tells who sends what, and why.
const application = page.locator("#applications tr", { hasText: "browser-test/1" }).first();
await application.waitFor({ timeout: 3000 });
assert.match(await application.textContent(), /list_differs.*puts everything back/s);

// The filter and the pause work.
await page.selectOption("[name=outcome]", "rescued");
for (const badge of await page.locator("#exchanges .badge").allTextContents()) assert.equal(badge, "rescued");
await page.selectOption("[name=outcome]", "");
await page.fill("[name=text]", "browser-test");
assert.equal(await page.locator("#exchanges > li").count(), 1);
await page.fill("[name=text]", "no such thing");
await page.waitForSelector("#empty");
await page.fill("[name=text]", "browser-test");
await page.click("#pause");
await update(4, differing);
await page.waitForFunction(() => document.getElementById("count").textContent.includes("1 new"), null, { timeout: 3000 });
assert.equal(await page.locator("#exchanges > li").count(), 1);
await page.click("#pause");
assert.equal(await page.locator("#exchanges > li").count(), 2);

// What is older than all that are at hand is found too. Regression: the alerts send people to exchanges that were not shown.
for (let sent = 0; sent < 210; sent++) await (await fetch(`${process.env.PROXY}/nothing`)).text();
const later = await open({});
await later.waitForFunction(() => document.querySelectorAll("#exchanges > li").length === 200);
await later.selectOption("[name=outcome]", "rescued");
await later.waitForFunction(() => document.querySelectorAll("#exchanges .badge.good").length > 0, null, { timeout: 3000 });
for (const badge of await later.locator("#exchanges .badge").allTextContents()) assert.equal(badge, "rescued");
assert.match(await later.textContent("#count"), /The newest \d+ that match, of all that are kept/);
await later.selectOption("[name=outcome]", "");
assert.equal(await later.locator("#exchanges > li").count(), 200);
await later.close();

// The mode is switched where it is shown, after a question.
page.once("dialog", (dialog) => dialog.accept());
await page.locator("#mode label", { hasText: "Observe only" }).click();
await inForce("observe");
assert.match((await update(7, differing)).headers.get("optin-proxy"), /outcome=(observed|exhausted|rescued)/);
page.once("dialog", (dialog) => dialog.dismiss());
await page.locator("#mode label", { hasText: "Enforce" }).click();
assert.ok(await page.locator("#mode [value=observe]").isChecked(), "nothing is changed without a yes");
page.once("dialog", (dialog) => dialog.accept());
await page.locator("#mode label", { hasText: "Enforce" }).click();
await inForce("enforce");

// The keyboard reaches everything that can be used.
await page.goto(url);
await page.waitForSelector(".row");
const reached = new Set();
for (let presses = 0; presses < 30; presses++) {
  await page.keyboard.press("Tab");
  reached.add(await page.evaluate(() => document.activeElement.name || document.activeElement.id || document.activeElement.className));
}
for (const name of ["skip", "mode", "outcome", "kind", "text", "pause", "row"]) assert.ok(reached.has(name), `${name} is not in ${[...reached]}`);

// Text stands out from its ground in both schemes, at every width; nothing has to be scrolled sideways.
for (const [name, width, colorScheme] of [["desktop", 1280, "light"], ["dark", 1280, "dark"], ["phone", 390, "light"], ["phone-dark", 390, "dark"]]) {
  const shown = await open({ viewport: { width, height: 900 }, colorScheme }, `#exchange/${id}`);
  await shown.waitForSelector(".diff");
  const poor = await shown.evaluate(() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
    const light = ([r, g, b]) => [r, g, b].map((it) => it / 255).map((it) => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4).reduce((sum, it, n) => sum + it * [0.2126, 0.7152, 0.0722][n], 0);
    const ground = (element) => { for (let at = element; at; at = at.parentElement) { const color = rgba(getComputedStyle(at).backgroundColor); if (color[3] > 0.99) return color; } return [255, 255, 255, 1]; };
    const found = [];
    for (const element of document.querySelectorAll("body *:not(script):not(noscript):not(noscript *)")) {
      if (![...element.childNodes].some((it) => it.nodeType === 3 && it.textContent.trim()) || element.closest("svg, .hidden, .skip, [hidden], option")) continue;
      const [a, b] = [light(rgba(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${element.className || element.tagName}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
    }
    return [...new Set(found)];
  });
  assert.deepEqual(poor, [], name);
  assert.ok(await shown.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${name} is wider than its window`);
  await shown.evaluate(() => scrollTo(0, 0));
  if (shots) await shown.screenshot({ path: `${shots}/${name}.png` });
  await shown.close();
}

// What is not there any more is said so, and stays said while the counts go on. Regression: the next count erased it.
const lost = await open({}, "#exchange/0123456789abcdef");
await lost.waitForSelector("#notice:not([hidden])");
const said = await lost.locator("#notice").textContent();
const counted = await lost.locator("#tiles").textContent();
await update(10, differing);
await lost.waitForFunction((before) => document.getElementById("tiles").textContent !== before, counted, { timeout: 3000 });
assert.equal(await lost.locator("#notice").textContent(), said);
await lost.close();
assert.match(faults.pop() ?? "", /404/, "the browser's own word on it");

// An exchange that is open stays, whatever comes after it. Regression: it went with the oldest.
const kept = await open({}, `#exchange/${id}`);
await kept.waitForSelector(".diff");
const entries = () => kept.locator("#exchanges > li").count();
for (let before; (before = await entries()) < 200;) {
  // Not more at once than are listed.
  await Promise.all(Array.from({ length: 15 }, () => update(13, differing)));
  await kept.waitForFunction((count) => document.querySelectorAll("#exchanges > li").length > count, before, { timeout: 3000 });
}
for (let more = 0; more < 2; more++) {
  const newest = await kept.locator("#exchanges > li").first().getAttribute("id");
  await update(13, differing);
  await kept.waitForFunction((id) => document.querySelector("#exchanges > li").id !== id, newest, { timeout: 3000 });
}
assert.ok(await kept.locator(".diff").isVisible());
await kept.close();

assert.deepEqual(faults, [], "errors on the console");
assert.deepEqual(foreign, [], "requests to elsewhere");
await browser.close();
console.log("the dashboard works in", executablePath);
