"""The page's style sheet: light and dark, narrow and wide, screen and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1f2328; --soft: #5c6370; --line: #dcdee2;
  --chip: #eef1f4; --accent: #0b63a5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181c; --card: #1f2227; --ink: #e4e6ea; --soft: #a2a9b4; --line: #363b43;
    --chip: #2c3138; --accent: #79b8ef;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1032px; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 {
  font-size: 1.3rem; margin: 3rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--line);
}
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 72ch; }
.soft { color: var(--soft); }
.soft, figcaption { font-size: .94rem; }
nav { margin: .9rem 0 1.6rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
a { color: var(--accent); text-underline-offset: .18em; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: .7rem;
  margin: 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; display: flex; flex-direction: column; }
.facts dt { color: var(--soft); font-size: .86rem; }
.facts dd { margin: 0; }
.facts .value { font-size: 1.35rem; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.facts .remark { color: var(--soft); font-size: .82rem; line-height: 1.4;
  overflow-wrap: anywhere; }
.note { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .8rem; }
figure { margin: 0; }
h2 + figure h3 { margin-top: 0; }
figcaption { max-width: 78ch; margin-bottom: .6rem; }
.scroll { overflow-x: auto; }
.picture { background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; }
.picture img { display: block; width: 100%; min-width: 660px; height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .34rem .9rem .34rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 500; font-size: .86rem; }
th.number, td.number { text-align: right; white-space: nowrap; }
.balance { width: 100%; }
.balance td:last-child, .balance th:last-child { padding-right: 0; }
.tokens { width: 100%; }
.tokens td:last-child { width: 100%; line-height: 2; padding-right: 0; }
.token { display: inline-block; background: var(--chip); border-radius: 5px; padding: 0 .42em;
  margin-right: .4em; line-height: 1.55; max-width: 100%; overflow-wrap: anywhere; }
.token small { color: var(--soft); margin-left: .4em; }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  margin: .6rem 0; padding: 0 1rem; }
details[open] { padding-bottom: .8rem; }
summary { cursor: pointer; padding: .55rem 0; font-weight: 500; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0;
  padding: .9rem 1rem; font-size: .88rem; line-height: 1.5; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details pre { border: 0; padding: 0; margin: 0; }
dl.glossary dt { font-weight: 600; margin-top: .7rem; }
dl.glossary dd { margin: .1rem 0 0; max-width: 72ch; }
@media (max-width: 560px) {
  body { padding: 1.25rem .8rem 3rem; }
  h1 { font-size: 1.4rem; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  .facts div { padding: .55rem .65rem; }
  .facts .value { font-size: 1.12rem; }
  th, td { padding-right: .6rem; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --chip: #eee; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav { display: none; }
  h2, h3, figcaption, dt { break-after: avoid; }
  figure, .facts div, tr { break-inside: avoid; }
  .picture { border: 0; padding: 0; }
  .picture img { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
