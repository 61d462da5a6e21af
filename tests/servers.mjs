// Servers for tests that run in Node.
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../", import.meta.url));
const BIN = join(ROOT, ".venv/bin");

/** `sluice serve` of the demo model, ready. */
export async function serve(...args) {
  const home = await mkdtemp(join(tmpdir(), "sluice-node-"));
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

/** A module that prints its address and serves until standard input ends. */
export async function serveModule(name, ...args) {
  const server = spawn(join(BIN, "python"), ["-m", name, ...args], { cwd: ROOT });
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
