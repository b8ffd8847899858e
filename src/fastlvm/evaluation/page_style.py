"""How a report page looks. Its plots take their colours from here: see `plots.COLOURS`."""

from __future__ import annotations

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #22272b; --muted: #5b6268; --faint: #e3e6e9;
  --baseline: #7a838a; --other: #b8bfc6; --fault: #b3261e; --fault-paper: #fdecea; --warning: #8a5a00;
  --warning-paper: #fff4de;
  --model-0: #0072b2; --model-1: #d55e00; --model-2: #009e73; --model-3: #aa4499; --model-4: #b07c00;
  --model-5: #5e4fa2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181b; --ink: #e6e9eb; --muted: #a4adb4; --faint: #2f363c;
    --baseline: #98a2aa; --other: #5d666e; --fault: #ff8a80; --fault-paper: #3a1714; --warning: #ffc65c;
    --warning-paper: #33260c;
    --model-0: #56b4e9; --model-1: #ff8c42; --model-2: #2fc79b; --model-3: #e08fd0; --model-4: #f0c541;
    --model-5: #a99bf0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--faint); }
h3 { font-size: 0.95rem; margin: 1.25rem 0 0.4rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.lede { padding-left: 0.9rem; border-left: 4px solid var(--model-0); font-size: 1.08rem; }
.finding { padding: 0.6rem 0.8rem; border-left: 4px solid; border-radius: 2px; max-width: none; }
.fault { border-color: var(--fault); background: var(--fault-paper); }
.warning { border-color: var(--warning); background: var(--warning-paper); }
.fault strong { color: var(--fault); }
.warning strong { color: var(--warning); }
.finding strong { margin-right: 0.4rem; text-transform: uppercase; font-size: 0.85em; letter-spacing: 0.04em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 26rem)); gap: 1.25rem 2.5rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: 0.85rem; margin-top: 0.25rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--model-0); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font: 0.875rem/1.5 system-ui, sans-serif; }
table { font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 5px 0.55rem; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0; }
tbody th:first-child { white-space: normal; min-width: 8rem; max-width: 24rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { tbody th:first-child { max-width: 9rem; } }
thead th { color: var(--muted); border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody th, tbody td { border-bottom: 1px solid var(--faint); }
tr.strong > * { font-weight: 650; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words th { vertical-align: top; color: var(--muted); }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: 0.9rem; padding: 0.25rem 0; }
.notes { color: var(--muted); font-size: 0.85rem; padding-left: 1.1rem; max-width: 46rem; }
"""
