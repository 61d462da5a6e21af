// Builds the page into gateway/web, or the folder that is named.
import { copyFile, mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const target = process.argv[2] ?? here("../gateway/web");

await mkdir(target, { recursive: true });
await build({
  entryPoints: { page: here("src/main.jsx") },
  outdir: target,
  bundle: true,
  format: "iife",
  minify: true,
  charset: "utf8",
  legalComments: "none", // they are in licenses.txt
  target: ["chrome111", "firefox115", "safari16.4"],
  jsx: "automatic",
  jsxImportSource: "preact",
});
for (const name of ["index.html", "page.svg"]) await copyFile(here(`src/${name}`), join(target, name));
await writeFile(join(target, "licenses.txt"), await licenses());

/** Of everything that is in page.js besides our own. */
async function licenses() {
  const { dependencies } = JSON.parse(await readFile(here("package.json"), "utf8"));
  const texts = Object.entries(dependencies).map(async ([name, version]) => {
    const text = await readFile(here(`node_modules/${name}/LICENSE`), "utf8");
    return `${name} ${version}\n\n${text.trim()}\n`;
  });
  return (await Promise.all(texts)).join(`\n${"-".repeat(80)}\n\n`);
}
