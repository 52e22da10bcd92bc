"""The documentation page: one file of our own that reads ``/openapi.json``. It loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #0a7; }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; display: grid; grid-template-columns: 17rem 1fr; min-height: 100vh }
nav { border-right: 1px solid var(--line); padding: 1rem; position: sticky; top: 0; height: 100vh; overflow: auto }
nav b { display: block; margin: .8rem 0 .2rem; text-transform: capitalize }
nav a { display: block; color: inherit; text-decoration: none; font: 12.5px/1.7 ui-monospace, monospace; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
nav a:hover { color: var(--accent) }
main { padding: 1rem 2rem 4rem; max-width: 62rem; min-width: 0 }
h1 { margin: .2rem 0 .6rem }
article { border-top: 1px solid var(--line); padding: 1.1rem 0 }
h2 { font: 600 15px/1.4 ui-monospace, monospace; margin: 0; overflow-wrap: anywhere }
.verb { color: var(--accent); display: inline-block; min-width: 4.2em }
p { margin: .4rem 0; white-space: pre-line }
table { border-collapse: collapse; margin: .4rem 0; width: 100% }
td { border-bottom: 1px solid var(--soft); padding: .2rem .6rem .2rem 0; vertical-align: top; font-size: 13.5px }
td:first-child { font-family: ui-monospace, monospace; white-space: nowrap }
details { margin: .4rem 0 } summary { cursor: pointer }
pre { background: var(--soft); padding: .7rem; overflow: auto; font-size: 12.5px; border-radius: .3rem }
@media (max-width: 50rem) { body { display: block } nav { position: static; height: auto; border: 0 } }
"""

_SCRIPT: Final = """
const make = (tag, text, parent, name) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (name) element.className = name;
  if (parent) parent.append(element);
  return element;
};
const prose = text => text.replace(/([^\\n])\\n(?!\\n)/g, '$1 ');  // one line break is the source's, two are a paragraph
const resolve = (doc, schema, depth = 0) => {
  if (schema === null || typeof schema !== 'object' || depth > 8) return schema;
  if (Array.isArray(schema)) return schema.map(item => resolve(doc, item, depth + 1));
  if (schema.$ref) return resolve(doc, schema.$ref.slice(2).split('/').reduce((at, step) => at[step], doc), depth + 1);
  return Object.fromEntries(Object.entries(schema).filter(([key]) => key !== 'title').map(([key, value]) => [key, resolve(doc, value, depth + 1)]));
};
const schemaOf = content => Object.entries(content || {})[0] || [];
const shown = (doc, label, content, parent) => {
  const [type, media] = schemaOf(content);
  if (!media || !media.schema) return;
  const box = make('details', '', parent);
  make('summary', label + ' · ' + type, box);
  box.addEventListener('toggle', () => {
    if (box.open && !box.querySelector('pre')) make('pre', JSON.stringify(resolve(doc, media.schema), null, 2), box);
  });
};
fetch('/openapi.json').then(answer => answer.json()).then(doc => {
  const main = document.querySelector('main'), nav = document.querySelector('nav'), groups = {};
  make('p', prose(doc.info.description), main);
  for (const [path, operations] of Object.entries(doc.paths))
    for (const [verb, operation] of Object.entries(operations))
      (groups[(operation.tags || ['other'])[0]] ||= []).push([path, verb, operation]);
  for (const [tag, operations] of Object.entries(groups)) {
    make('b', tag, nav);
    for (const [path, verb, operation] of operations) {
      const article = make('article', '', main);
      article.id = operation.operationId;
      make('a', verb.toUpperCase() + ' ' + path, nav).href = '#' + article.id;
      const heading = make('h2', '', article);
      make('span', verb.toUpperCase(), heading, 'verb');
      heading.append(' ' + path);
      if (operation.description) make('p', prose(operation.description), article);
      if ((operation.parameters || []).length) {
        const table = make('table', '', article);
        for (const parameter of operation.parameters) {
          const row = make('tr', '', table);
          make('td', parameter.name, row);
          make('td', parameter.in + (parameter.required ? ', required' : ''), row);
          make('td', parameter.description || '', row);
        }
      }
      shown(doc, 'Request', (operation.requestBody || {}).content, article);
      for (const [status, response] of Object.entries(operation.responses || {}))
        shown(doc, status + ' ' + (response.description || ''), response.content, article);
    }
  }
}).catch(() => make('p', 'The document at /openapi.json could not be read.', document.querySelector('main')));
"""

PAGE: Final = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Farebox API</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<style>{_STYLE}</style></head><body><nav><strong>Farebox API</strong></nav>"
    '<main><h1>Control API</h1><p>The whole reference as OpenAPI 3.1: <a href="/openapi.json">/openapi.json</a></p></main>'
    f"<script>{_SCRIPT}</script></body></html>"
).encode()


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_HEADERS: Final = (
    (
        b"content-security-policy",
        (
            f"default-src 'none'; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ).encode(),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
