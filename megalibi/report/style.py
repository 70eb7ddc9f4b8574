"""The look of a report: a paper's tables, light and dark, on screen and in print."""

from __future__ import annotations

STYLESHEET = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2430; --muted: #667085; --grid: #e4e7ec;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73;
  --series-3: #cc79a7; --series-4: #e69f00; --series-5: #56b4e9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --ink: #e6e8ec; --muted: #98a2b3; --grid: #2c323d;
    --series-0: #4aa5dc; --series-1: #f08a4b; --series-2: #3cc39a;
  }
}
@media print {
  :root { --paper: #ffffff; --ink: #000000; --muted: #555555; --grid: #dddddd;
          --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, table { break-inside: avoid; }
  h2 { break-after: avoid; }
  details { display: none; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 50rem; padding: 3rem 1.5rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header { border-bottom: 1px solid var(--grid); padding-bottom: 1.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: .6rem 0; }
.lead { font-size: 1.05rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums;
  border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink);
}
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody.group + tbody.group tr:first-child > * { border-top: 1px solid var(--grid); }
table.numbers :is(th, td):not(:first-child) { text-align: right; padding: .28rem 0 .28rem .8rem; white-space: nowrap; }
table.facts tbody th { width: 34%; color: var(--muted); font-weight: 400; }
td small { color: var(--muted); font-size: .8125rem; }
tr.trained { font-weight: 600; }
figure { margin: 1.2rem 0 0; }
figure + .scroll, .scroll + .scroll, figure + figure { margin-top: 1.8rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .3rem; }
code, pre { font: .84em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; border: 1px solid var(--grid); border-radius: 4px; padding: .8rem 1rem; }
caption code, figcaption code { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--muted); }
footer { margin-top: 3rem; border-top: 1px solid var(--grid); padding-top: .8rem; }
"""
