// The chat page in a real browser against real servers: `make test-page`.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { fileURLToPath } from "node:url";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { AXE, launch, openPage, PATIENCE, serve, serveText } from "./browser.mjs";

let browser, server;
before(async () => ([browser, server] = await Promise.all([launch(), serve()])), { timeout: PATIENCE * 2 });
after(async () => {
  await browser?.close();
  await server?.end();
});

const composer = (page) => page.getByRole("textbox", { name: "Message", exact: true });
const answers = (page) => page.locator(".answer");
const button = (where, name) => where.getByRole("button", { name, exact: true });
const textOf = (page) => answers(page).last().locator(".markdown").innerText();

async function ask(page, text) {
  await composer(page).fill(text);
  await composer(page).press("Enter");
}

/** Waits until the last answer has ended, in whatever way. */
async function ended(page) {
  await button(answers(page).last(), "Answer again").waitFor();
  await button(page, "Send").waitFor();
}

async function set(page, fields) {
  await button(page, "Settings").click();
  for (const [label, value] of Object.entries(fields)) {
    if (value === true) await page.getByLabel(label).check();
    else await page.getByLabel(label).fill(value);
  }
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "detached" });
}

/** Until no sequence runs: the server has noticed that nobody waits for it. */
async function untilIdle(url) {
  const signal = AbortSignal.timeout(PATIENCE);
  while (
    !/^sluice:num_requests_running\{.*\} 0\.0$/m.test(await (await fetch(`${url}metrics`, { signal })).text())
  ) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

/** A stream that goes on for as long as it may: the request is sent on with `ignore_eos`. */
async function beginLong(page) {
  await page.route(
    "**/v1/chat/completions",
    (route) =>
      route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) }),
    { times: 1 },
  );
  await ask(page, "Tell me a long story.");
  await page.waitForFunction(() => document.querySelector(".answer .markdown")?.innerText.length > 100);
}

test("a conversation", { timeout: 4 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  await set(page, { Temperature: "0" });
  await ask(page, "What is 7 plus 5?");
  await ended(page);
  assert.match(await textOf(page), /12/);
  assert.match(
    await page.locator(".stats").innerText(),
    /^\d+ tokens · [\d.]+ tokens\/s · first token after [\d.]+ (ms|s)$/,
  );
  assert.match(await page.locator("[aria-live=polite]").last().textContent(), /^Answer finished: .*12/);
  assert.equal(await composer(page).inputValue(), "");

  await ask(page, "What is tensor parallelism?");
  await ended(page);
  assert.equal(await answers(page).count(), 2);
  const second = await textOf(page);

  await button(answers(page).last(), "Answer again").click();
  await ended(page);
  assert.equal(await textOf(page), second, "greedy answers are the same");
  assert.match(await answers(page).last().locator(".versions").innerText(), /2\/2/);

  await page.locator(".question").first().hover();
  await button(page.locator(".question").first(), "Edit message").click();
  await page.getByRole("textbox", { name: "Edit message" }).fill("What is 3 plus 4?");
  await page.keyboard.press("Enter");
  await ended(page);
  assert.match(await textOf(page), /7/);
  assert.equal(await answers(page).count(), 1);
  await button(page, "Previous version").first().click();
  assert.equal(await answers(page).count(), 2);
  assert.equal(await textOf(page), second);

  await page.reload();
  await page.locator(".conversations .open").first().click();
  assert.equal(await answers(page).count(), 2, "the conversation was kept");
  assert.equal(await textOf(page), second);
  await button(page, "Delete “What is 7 plus 5?”").click();
  assert.equal(await page.locator(".conversations .open").count(), 0);
  await page.reload();
  assert.equal(await page.locator(".conversations .open").count(), 0);
  assert.deepEqual(page.errors, []);
  assert.ok(
    page.asked.every((url) => url.startsWith(server.url)),
    page.asked.join("\n"),
  );
  await page.context().close();
});

test("requests copied as commands do the same", { timeout: 3 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url, { permissions: ["clipboard-read", "clipboard-write"] });
  await set(page, { Temperature: "0", "System prompt": 'It\'s "quoted" & $HOME.' });
  await ask(page, "What is 2 plus 2?");
  await ended(page);
  const answer = await textOf(page);
  const run = promisify(execFile);
  const python = fileURLToPath(new URL("../../.venv/bin/python", import.meta.url));

  await button(answers(page), "Copy this request as Python").click();
  await button(answers(page), "Copied").waitFor();
  const code = await page.evaluate(() => navigator.clipboard.readText());
  assert.equal((await run(python, ["-c", code])).stdout.trim(), answer);

  await button(answers(page), "Copy this request as curl").click();
  await page.waitForFunction(async () => (await navigator.clipboard.readText()).startsWith("curl "));
  const command = await page.evaluate(() => navigator.clipboard.readText());
  const { stdout } = await run("sh", ["-c", command]);
  assert.equal(JSON.parse(stdout).choices[0].message.content, answer);
  await page.context().close();
});

test("stopped midway", { timeout: 3 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  await beginLong(page);
  await composer(page).fill("typed meanwhile");
  await composer(page).press("Escape");
  await ended(page);
  const stopped = await textOf(page);
  assert.match(await answers(page).innerText(), /Stopped\./);
  assert.ok(stopped.length > 100);
  assert.equal(await composer(page).inputValue(), "typed meanwhile");
  await untilIdle(server.url);
  assert.equal(await textOf(page), stopped, "nothing comes after");
  assert.match(await page.locator(".stats").innerText(), /tokens\/s/);
  await page.context().close();
});

test("the server is killed midway", { timeout: 5 * PATIENCE }, async () => {
  const doomed = await serve();
  const page = await openPage(browser, doomed.url);
  await beginLong(page);
  await composer(page).fill("not lost");
  await doomed.end("SIGKILL");
  const notice = page.locator(".answer .notice.error");
  await notice.waitFor();
  assert.match(await notice.innerText(), /connection to the server was lost.*What came before is kept/is);
  assert.ok((await textOf(page)).length > 100);
  await page.getByText("The server does not answer").waitFor();

  await button(notice, "Try again").click();
  await page.locator(".answer .notice.error").getByText("The server does not answer.").waitFor();
  assert.equal(await composer(page).inputValue(), "not lost");

  const { port } = new URL(doomed.url);
  const next = await serve("--port", port);
  await page.getByText("The server does not answer. Trying again").waitFor({ state: "detached" });
  await button(page, "Try again").click();
  await ended(page);
  assert.equal(await page.locator(".answer .notice.error").count(), 0);
  assert.notEqual(await textOf(page), "");
  await button(page, "Previous version").click();
  assert.ok((await textOf(page)).length > 100, "what came first is still there");
  await page.context().close();
  await next.end();
});

test("hostile Markdown", { timeout: 3 * PATIENCE }, async () => {
  const scripted = await serveText(fileURLToPath(new URL("hostile.md", import.meta.url)));
  const page = await openPage(browser, scripted.url);
  page.on("dialog", (dialog) => page.errors.push(`dialog: ${dialog.message()}`));
  await ask(page, "<img src=x onerror=\"window.pwned='question'\"> **plain**");
  await ended(page);
  await answers(page).getByText("The last line.").waitFor();
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  const found = await answers(page)
    .locator(".markdown")
    .evaluate((box) => {
      const all = [...box.querySelectorAll("*")].filter((element) => !element.closest(".code-header"));
      return {
        tags: [...new Set(all.map((element) => element.localName))].sort(),
        attributes: [...new Set(all.flatMap((element) => element.getAttributeNames()))].sort(),
        links: all
          .filter(({ localName }) => localName === "a")
          .map((link) => link.getAttribute("href"))
          .filter(Boolean)
          .sort(),
        code: [...box.querySelectorAll("pre")].map((pre) => pre.textContent),
        colours: box.querySelectorAll("pre .hljs-keyword").length,
      };
    });
  const harmless = "a code div em h1 input li ol p pre span strong table tbody td th thead tr ul".split(" ");
  assert.deepEqual(
    found.tags.filter((tag) => !harmless.includes(tag) || tag === "input"),
    [],
  );
  assert.deepEqual(
    found.attributes.filter(
      (name) => !["align", "class", "href", "rel", "tabindex", "target", "title"].includes(name),
    ),
    [],
  );
  assert.deepEqual(found.links, ["http://198.51.100.7/leak?q=secret", "https://example.com/?a=1&b=2"]);
  assert.ok(found.code[1].includes("</code></pre><script>window.pwned = 'break'</script>"), "code is whole");
  assert.ok(found.colours > 0, "code is coloured");
  assert.match(await page.locator(".bubble").innerText(), /<img src=x onerror=.* \*\*plain\*\*/);
  for (const link of await answers(page).locator("a:not([href])").all()) await link.click();
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.deepEqual(page.errors, []);
  assert.ok(
    page.asked.every((url) => url.startsWith(scripted.url)),
    page.asked.join("\n"),
  );

  await page.reload();
  await page.locator(".conversations .open").click();
  await answers(page).getByText("The last line.").waitFor();
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  await page.context().close();
  await scripted.end();
});

test("the policy holds where nothing else would", { timeout: 2 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  const tried = await page.evaluate(async () => {
    const attempts = {
      html: () => (document.body.innerHTML += "<p>x</p>"),
      elsewhere: () => fetch("http://127.0.0.1:9/"),
      script: () =>
        new Promise((resolve, reject) => {
          const script = Object.assign(document.createElement("script"), {
            onload: resolve,
            onerror: reject,
          });
          script.setAttribute("src", "data:text/javascript,1");
          document.head.append(script);
        }),
      image: () =>
        new Promise((resolve, reject) =>
          Object.assign(new Image(), { onload: resolve, onerror: reject, src: "http://127.0.0.1:9/x.png" }),
        ),
    };
    const outcomes = {};
    for (const [name, attempt] of Object.entries(attempts)) {
      outcomes[name] = await Promise.resolve()
        .then(attempt)
        .then(
          () => "done",
          () => "refused",
        );
    }
    return outcomes;
  });
  assert.deepEqual(tried, { html: "refused", elsewhere: "refused", script: "refused", image: "refused" });
  const reasons = page.errors.filter((text) =>
    /Content Security Policy|TrustedHTML|TrustedScript/.test(text),
  );
  assert.ok(reasons.length >= 3, page.errors.join("\n"));
  await page.context().close();
});

test("a phone's width", { timeout: 3 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url, {
    viewport: { width: 360, height: 640 },
    hasTouch: true,
    isMobile: true,
  });
  const fits = async (where) => {
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= 360, `${where}: ${width} px`);
    const outside = await page
      .locator("button:visible, textarea:visible, select:visible")
      .evaluateAll((all) =>
        all
          .map((one) => [one.getAttribute("aria-label") ?? one.textContent, one.getBoundingClientRect()])
          .filter(([, box]) => box.left < 0 || box.right > innerWidth)
          .map(([name]) => name),
      );
    assert.deepEqual(outside, [], where);
  };
  await fits("empty");
  await composer(page).fill("What is pipeline parallelism?");
  await button(page, "Send").tap();
  await ended(page);
  await fits("a conversation");
  await button(page, "Settings").tap();
  await page.getByRole("dialog").waitFor();
  await fits("settings");
  await button(page.getByRole("dialog"), "Close").tap();
  await button(page, "Conversations").tap();
  await fits("conversations");
  await button(page.getByRole("dialog"), "New conversation").tap();
  await page.getByRole("dialog").waitFor({ state: "detached" });
  assert.equal(await answers(page).count(), 0);
  assert.deepEqual(page.errors, []);
  await page.context().close();
});

test("by keyboard only", { timeout: 3 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  const { keyboard } = page;
  const focused = () =>
    page.evaluate(
      () => document.activeElement.getAttribute("aria-label") ?? document.activeElement.textContent.trim(),
    );
  const tabTo = async (name, key = "Tab") => {
    for (let i = 0; i < 40 && (await focused()) !== name; i++) await keyboard.press(key);
    assert.equal(await focused(), name);
  };
  assert.equal(await focused(), "Message", "one can type at once");
  await keyboard.type("What is");
  await keyboard.press("Shift+Enter");
  await keyboard.type("7 plus 5?");
  await keyboard.press("Enter");
  await ended(page);
  assert.equal(await page.locator(".bubble").innerText(), "What is\n7 plus 5?");
  assert.equal(await focused(), "Message");

  await tabTo("Settings", "Shift+Tab");
  await keyboard.press("Enter");
  await page.getByRole("dialog", { name: "Settings" }).waitFor();
  await tabTo("Close");
  await page.getByLabel("Temperature").focus();
  await keyboard.type("hot");
  await page.getByText("Temperature must be a number. It is not sent.").waitFor();
  for (let i = 0; i < 3; i++) await keyboard.press("Backspace");
  await keyboard.type("0");
  await tabTo("Close", "Shift+Tab");
  await keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "detached" });
  assert.equal(await focused(), "Settings", "the focus goes back");

  await tabTo("Answer again");
  await keyboard.press("Enter");
  await ended(page);
  await tabTo("Edit message", "Shift+Tab");
  await keyboard.press("Enter");
  await page.waitForFunction(() => document.activeElement.matches(".editor textarea"));
  await keyboard.press("Escape");
  await page.waitForFunction(() => document.activeElement.getAttribute("title") === "Edit message");

  await tabTo("Skip to the message box", "Shift+Tab");
  await keyboard.press("Enter");
  assert.equal(await focused(), "Message");
  await page.context().close();
});

test("tokens and their alternatives", { timeout: 3 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  await set(page, { Temperature: "0", "Token probabilities": true });
  await ask(page, "What is 7 plus 5?");
  await ended(page);
  await button(answers(page), "Tokens and alternatives").click();
  const tokens = page.locator(".token");
  assert.ok((await tokens.count()) > 3);
  await tokens.nth(2).click();
  assert.equal(await tokens.nth(2).getAttribute("aria-pressed"), "true");
  const label = await tokens.nth(2).innerText();
  assert.equal(await page.locator(".alternatives tr").count(), 5);
  assert.equal(await page.locator(".alternatives .drawn code").innerText(), label);
  await page.keyboard.press("ArrowRight");
  assert.equal(await tokens.nth(3).getAttribute("aria-pressed"), "true");
  assert.ok(await tokens.nth(3).evaluate((element) => element === document.activeElement));
  assert.deepEqual(page.errors, []);
  await page.context().close();
});

test("a server with keys", { timeout: 4 * PATIENCE }, async () => {
  const closed = await serve("--api-key", "right");
  const page = await openPage(browser, closed.url, { waits: false });
  const dialog = page.getByRole("dialog", { name: "API key" });
  await dialog.waitFor();
  await page.getByLabel("API key").last().fill("wrong");
  await page.keyboard.press("Enter");
  await dialog.getByText("does not accept the key").waitFor();
  await page.getByLabel("API key").last().fill("right");
  await page.keyboard.press("Enter");
  await dialog.waitFor({ state: "detached" });
  await set(page, { Temperature: "0" });
  await ask(page, "What is 7 plus 5?");
  await ended(page);
  assert.match(await textOf(page), /12/);
  assert.equal(
    await page.evaluate(() => JSON.stringify(localStorage).includes("right")),
    false,
    "the key is the tab's",
  );
  await page.reload();
  await page.locator(".models option:not([value=''])").first().waitFor({ state: "attached" });
  await page.context().close();
  await closed.end();
});

test("thoughts, and an error underway", { timeout: 2 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  const event = (value) => `data: ${JSON.stringify(value)}\n\n`;
  const chunk = (delta) => event({ choices: [{ index: 0, delta }] });
  const body =
    chunk({ reasoning_content: "Let me *think*." }) +
    chunk({ content: "So far" }) +
    event({ error: { message: "Two groups died.", code: "request_poisoned" } });
  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({ contentType: "text/event-stream", body }),
  );
  await ask(page, "hi");
  await ended(page);
  const thoughts = page.locator("details.reasoning");
  assert.equal(await thoughts.getAttribute("open"), null, "closed at first");
  await thoughts.locator("summary").click();
  assert.equal(await thoughts.locator("em").innerText(), "think");
  assert.equal((await answers(page).locator(".markdown").last().innerText()).trim(), "So far");
  assert.match(
    await page.locator(".notice.error").innerText(),
    /Two groups died\. What came before is kept\./,
  );
  await page.context().close();
});

test("accessible, as far as axe can tell", { timeout: 4 * PATIENCE }, async () => {
  const scripted = await serveText(fileURLToPath(new URL("hostile.md", import.meta.url)));
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [1100, 360]) {
      const page = await openPage(browser, scripted.url, {
        bypassCSP: true,
        colorScheme,
        viewport: { width, height: 760 },
      });
      const check = async (view) => {
        const { passes, violations } = await page.evaluate(AXE);
        const where = `${view}, ${colorScheme}, ${width} px`;
        assert.ok(passes.length > 20, where);
        assert.deepEqual(
          violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]),
          [],
          where,
        );
      };
      await check("empty");
      await button(page, "Settings").click();
      await page.getByLabel("Token probabilities").check();
      await page.getByLabel("Top p").fill("3");
      await check("settings");
      await page.getByLabel("Top p").fill("");
      await page.keyboard.press("Escape");
      await ask(page, "go");
      await ended(page);
      await check("a conversation");
      await button(answers(page), "Tokens and alternatives").click();
      await check("tokens");
      await page.context().close();
    }
  }
  await scripted.end();
});

test("what was typed is there after a reload", { timeout: 2 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url);
  await composer(page).fill("half a thought");
  await page.reload();
  assert.equal(await composer(page).inputValue(), "half a thought");
  await page.context().close();
});

test("two tabs", { timeout: 3 * PATIENCE }, async () => {
  const first = await openPage(browser, server.url);
  const second = await first.context().newPage();
  await second.goto(server.url);
  await set(first, { Temperature: "0" });
  await ask(first, "What is 7 plus 5?");
  await ended(first);
  await second.locator(".conversations .open").click();
  await answers(second).getByText("12").waitFor();
  await ask(second, "What is 3 plus 4?");
  await ended(second);
  await first.locator(".answer").nth(1).getByText("7").first().waitFor();
  await first.context().close();
});

test("light and dark", { timeout: 2 * PATIENCE }, async () => {
  const page = await openPage(browser, server.url, { colorScheme: "dark" });
  const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const dark = await background();
  await page.emulateMedia({ colorScheme: "light" });
  await page.waitForFunction((dark) => getComputedStyle(document.body).backgroundColor !== dark, dark);
  await button(page, "Settings").click();
  await page.getByText("Dark", { exact: true }).click();
  assert.equal(await background(), dark);
  await page.reload();
  assert.equal(await background(), dark, "the choice is kept");
  await page.context().close();
});
