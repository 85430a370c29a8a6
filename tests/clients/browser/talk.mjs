// Talks to the page in headless Chromium and prints what was seen as JSON.
// node talk.mjs '{"url": ..., "key": ..., "texts": [...], "picture": ..., "width": 1280, "scheme": "light"}'
import chromium from "@sparticuz/chromium";
import { chromium as playwright } from "playwright-core";

const asked = JSON.parse(process.argv[2]);
const browser = await playwright.launch({ args: chromium.args, executablePath: await chromium.executablePath() });
try {
  const page = await browser.newPage({ viewport: { width: asked.width, height: 800 }, colorScheme: asked.scheme });
  const errors = [], requests = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("requestfailed", (request) => errors.push(`${request.url()} failed`));
  page.on("request", (request) => requests.push(request.url()));

  await page.goto(asked.url);
  await page.click("details summary");
  await page.fill("#key", asked.key);
  await page.fill("#temperature", "0");
  await page.click("details summary");
  await page.evaluate(() => {
    window.lengths = new Set();
    const note = () => window.lengths.add(document.querySelector(".content")?.textContent.length || 0);
    new MutationObserver(note).observe(document.getElementById("talk"), { childList: true, subtree: true });
  });
  for (const text of asked.texts) {
    await page.fill("#text", text);
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.getElementById("send").textContent === "Send" && /token/.test(
      [...document.querySelectorAll(".meta")].at(-1)?.textContent || ""), null, { timeout: 60000 });
  }
  const seen = await page.evaluate(() => {
    const paint = document.getElementById("map"), all = (path) => [...document.querySelectorAll(path)];
    const pixels = paint.getContext("2d").getImageData(0, 0, paint.width, paint.height).data;
    return {
      lengths: [...window.lengths],
      answers: all(".content").map((one) => one.textContent),
      reasoning: all(".reasoning").map((one) => ({ open: one.open, text: one.lastChild.textContent })),
      meta: all(".meta").map((one) => one.textContent),
      problems: all(".error").map((one) => one.textContent),
      token: document.getElementById("token").textContent,
      map: { width: paint.width, height: paint.height, painted: pixels.filter((a, i) => i % 4 === 3 && a).length,
             shown: paint.checkVisibility() },
      overflow: document.documentElement.scrollWidth - window.innerWidth,
      background: getComputedStyle(document.body).backgroundColor,
    };
  });
  const words = page.locator(".content").first().locator(".t");
  await words.first().hover();
  seen.first = await page.textContent("#token");
  await page.screenshot({ path: asked.picture });
  console.log(JSON.stringify({ ...seen, errors, requests }));
} finally {
  await browser.close();
}
