// Chromium without a window, and real servers for it to talk to.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { serveModule } from "../servers.mjs";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const installed = createRequire(join(ROOT, "web/package.json"));
const { chromium } = installed("playwright-core");

export { serve } from "../servers.mjs";

export const PATIENCE = 60_000; // longer than anything here takes on a busy machine

/** Code that gives axe's opinion of a page. */
export const AXE = `${readFileSync(installed.resolve("axe-core/axe.min.js"), "utf8")}; axe.run()`;

export function launch() {
  const executablePath =
    process.env.CHROMIUM ??
    ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
  if (!executablePath)
    throw new Error(
      "There is no Chromium: install it (apt-get install chromium), or name one: CHROMIUM=PATH make test-page",
    );
  return chromium.launch({ executablePath, args: process.getuid() === 0 ? ["--no-sandbox"] : [] });
}

/** A page that has failed nowhere: what it logs as errors is in `page.errors`, what it asked for in `page.asked`. */
export async function openPage(browser, url, { waits = true, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1100, height: 760 }, ...options });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.errors = [];
  page.asked = [];
  page.on("pageerror", (error) => page.errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && page.errors.push(message.text()));
  page.on("request", (request) => page.asked.push(request.url()));
  await page.goto(url);
  if (waits) await page.locator(".models option:not([value=''])").first().waitFor({ state: "attached" });
  return page;
}

/** The real gateway in front of a model that says what is in `file`. */
export const serveText = (file) => serveModule("tests.page.scripted_server", file);
