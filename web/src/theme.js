/** Light, dark, or as the system has it. style.css goes by `data-theme`, which is "light" or "dark". */
import { keep, storageOf } from "./storage.js";

const KEY = "sluice.theme";
const system = globalThis.matchMedia("(prefers-color-scheme: dark)");
export const THEMES = { system: "System", light: "Light", dark: "Dark" };

export function theme() {
  const kept = storageOf("localStorage").getItem(KEY);
  return kept in THEMES ? kept : "system";
}

export function setTheme(name) {
  keep(storageOf("localStorage"), KEY, name);
  applyTheme();
}

/** Now, and again whenever the system changes. */
export function followTheme() {
  applyTheme();
  system.addEventListener("change", applyTheme);
}

function applyTheme() {
  const name = theme();
  document.documentElement.dataset.theme = name === "system" ? (system.matches ? "dark" : "light") : name;
}
