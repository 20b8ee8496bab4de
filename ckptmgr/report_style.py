"""The frame and the style of the report's page: one file, two colour schemes, any width."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --paper: #fbfaf7; --sheet: #ffffff; --ink: #22262b; --soft: #6a7078; --rule: #e4e1da;
  --ok: #2f7d6b; --warn: #c58a1b; --danger: #b8443c; --quiet: #b9bdc2; --line: #7d93a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --sheet: #1c2025; --ink: #e2e4e7; --soft: #949ba4; --rule: #2d3239;
    --ok: #5fb8a2; --warn: #dcab4d; --danger: #e0776e; --quiet: #545b64; --line: #6d8299;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
header { margin-bottom: 2rem }
h1 { margin: 0; font-size: 1.5rem; font-weight: 600; overflow-wrap: anywhere }
h2 { margin: 0 0 .75rem; font-size: 1rem; font-weight: 600 }
header p, section > p, .note { margin: .5rem 0 0; color: var(--soft); font-size: .875rem }
section {
  margin-top: 1rem; padding: 1.25rem; background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 10px;
}
dl {
  display: grid; gap: 1rem; margin: 0;
  grid-template-columns: repeat(3, 1fr);
}
dl div { padding: 1rem 1.25rem; background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 10px }
dt { color: var(--soft); font-size: .8125rem }
dd { margin: .25rem 0 0; font-size: 1.5rem; font-weight: 600; line-height: 1.2 }
dl p { margin: .25rem 0 0; color: var(--soft); font-size: .8125rem }
.pair { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)) }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg.bar { height: 18px; border-radius: 5px; overflow: hidden }
.grid { stroke: var(--rule) }
.mark { stroke: var(--danger); stroke-dasharray: 3 4; opacity: .7 }
.axis { fill: var(--soft); font-size: 10px }
.end { text-anchor: end } .middle { text-anchor: middle }
.pair .axis { font-size: 20px }
polyline { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round;
  vector-effect: non-scaling-stroke }
.pair circle { r: 5px }
circle.plain { fill: var(--line) }
circle.ok, rect.ok { fill: var(--ok) } circle.warn, rect.warn { fill: var(--warn) }
circle.danger, rect.danger { fill: var(--danger) } circle.quiet, rect.quiet { fill: var(--quiet) }
i { display: inline-block; width: .625rem; height: .625rem; margin-right: .375rem;
  border-radius: 50% }
i.ok { background: var(--ok) } i.warn { background: var(--warn) }
i.danger { background: var(--danger) } i.quiet { background: var(--quiet) }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0 0; padding: 0;
  list-style: none; font-size: .875rem }
.legend b { font-weight: 600 } .legend span { color: var(--soft) }
.scroll { overflow-x: auto; margin: 0 -1.25rem; padding: 0 1.25rem }
table { width: 100%; border-collapse: collapse; font-size: .875rem; white-space: nowrap }
th { padding: .375rem 1rem .375rem 0; color: var(--soft); font-weight: 500; text-align: left }
td { padding: .375rem 1rem .375rem 0; border-top: 1px solid var(--rule) }
.empty { color: var(--soft); font-size: .875rem }
footer { margin-top: 2rem; color: var(--soft); font-size: .8125rem }
@media (max-width: 34rem) {
  body { padding: 1.5rem 1rem 3rem }
  dl { gap: .625rem; grid-template-columns: 1fr 1fr } dl div { padding: .75rem .875rem }
  dd { font-size: 1.25rem } circle { r: 5px } .axis, .pair .axis { font-size: 22px }
}
@media print { section, dl div { break-inside: avoid } }
</style>
</head>
<body>
<header><h1>$title</h1><p>ckptmgr report, made $made</p></header>
<main>
<dl>
$figures
</dl>
<section><h2>Where the time went</h2>$time<p>$time_note</p></section>
<section><h2>Steps over time</h2>
$steps
<ul class="legend"><li><i class="ok"></i>committed</li><li><i class="quiet"></i>retired</li>
<li><i class="warn"></i>undecided</li><li><i class="danger"></i>given up</li></ul>
<p>A line is an attempt; a dashed mark is a restart.</p></section>
<div class="pair">
<section><h2>Stall per snapshot</h2>
$stall</section>
<section><h2>Time to the store</h2>
$written</section>
</div>
<section><h2>Throughput of each commit, MiB/s</h2>
$speed</section>
<section><h2>Restarts</h2><div class="scroll">$restarts</div></section>
<section><h2>Steps</h2><div class="scroll">$rows</div>$more</section>
</main>
<footer>Everything here comes from the records of the store; times are those of the hosts.</footer>
</body>
</html>
"""
