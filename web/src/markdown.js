/**
 * What a model wrote, as HTML that does nothing. Three walls: HTML in the text is shown, not meant; DOMPurify
 * lets through only the elements that Markdown makes; and the page's policy runs no script and loads no image.
 */
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import { Marked } from "marked";

const LANGUAGES = { bash, cpp, css, diff, go, java, javascript, json, python, rust, sql, xml, yaml };
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

const MAX_MARKDOWN = 200_000; // characters; beyond, text is shown as it is
const MAX_HIGHLIGHTED = 20_000;

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => {
      const language = (lang ?? "").split(/\s/)[0];
      return `<pre title="${escaped(language)}"><code>${highlighted(text, language)}</code></pre>`;
    },
  },
});

/** HTML for each block of the text, so that those which have not changed can stay as they are. */
export function toBlocks(text) {
  if (text.length > MAX_MARKDOWN) return [`<pre title=""><code>${escaped(text)}</code></pre>`];
  return marked
    .lexer(text)
    .map((token) => marked.parser([token]))
    .filter(Boolean);
}

/** A fragment to put into the page. Code blocks are marked by their `title`, the language. */
export function toFragment(html) {
  const fragment = DOMPurify.sanitize(html, {
    ALLOWED_TAGS:
      "a,b,blockquote,br,code,del,em,h1,h2,h3,h4,h5,h6,hr,li,ol,p,pre,span,strong,table,tbody,td,th,thead,tr,ul".split(
        ",",
      ),
    ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
    ADD_URI_SAFE_ATTR: ["align", "start"], // other values than addresses
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  return fragment;
}

function highlighted(text, language) {
  const isKnown = hljs.getLanguage(language) && text.length <= MAX_HIGHLIGHTED;
  return isKnown ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escaped(text);
}

function escaped(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (character) => entities[character]);
}
