// Chromium without a window, and real servers for it to talk to.
import { spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const BIN = join(ROOT, ".venv/bin");
const installed = createRequire(join(ROOT, "web/package.json"));
const { chromium } = installed("playwright-core");

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

/** `sluice serve` of the demo model, ready. */
export async function serve(...args) {
  const home = await mkdtemp(join(tmpdir(), "sluice-page-"));
  const server = spawn(
    join(BIN, "sluice"),
    ["serve", "--port", "0", "--log-dir", home, "--omp-threads", "1", ...args],
    { cwd: home },
  );
  const url = await firstMatch(server, /^ready on (\S+)\/v1/m);
  const ended = new Promise((resolve) => server.on("exit", resolve));
  const end = async (signal = "SIGTERM") => {
    if (server.exitCode === null && server.signalCode === null) server.kill(signal);
    await ended;
    await rm(home, { recursive: true, force: true });
  };
  return { url: `${url}/`, end };
}

/** The real gateway in front of a model that says what is in `file`. */
export async function serveText(file) {
  const server = spawn(join(BIN, "python"), ["-m", "tests.page.scripted_server", file], { cwd: ROOT });
  const url = await firstMatch(server, /^(http:\S+)/m);
  const end = () => {
    server.stdin.end();
    return new Promise((resolve) => server.on("exit", resolve));
  };
  return { url: `${url}/`, end };
}

function firstMatch(child, pattern) {
  let output = "";
  return new Promise((resolve, reject) => {
    const read = (data) => {
      output += data;
      const match = pattern.exec(output);
      if (match) resolve(match[1]);
    };
    child.stdout.on("data", read);
    child.stderr.on("data", read);
    child.on("error", reject);
    child.on("exit", (code) => reject(new Error(`The server ended with ${code}:\n${output}`)));
  });
}
