"""``GET /``: a page for a technician who stands in front of the device. Self-contained, no other host asked.

A string in a module, so that it is installed wherever the code is. Everything that it shows is set as text,
never as markup.
"""

from __future__ import annotations

from typing import Final

PAGE: Final = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>edge-agent</title>
<style>
body{font:16px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:.5rem 0 2rem}
td,th{text-align:left;padding:.4rem .6rem;border-bottom:1px solid #ddd}
.READY{color:#0a6b2d}.UNAVAILABLE{color:#b3261e}.LOADING{color:#8a6100}
code{background:#f3f3f3;padding:.1rem .3rem}#note{color:#666}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#333}code{background:#222}
.READY{color:#6fcf97}.UNAVAILABLE{color:#ff8a80}.LOADING{color:#e6c15a}}
</style>
<h1>edge-agent</h1>
<table id="models"><thead><tr><th>model<th>version<th>state<th>reason<th>drift<th>digest</thead>
<tbody></tbody></table>
<table id="answers"><thead><tr><th>answered by<th>model<th>version<th>reason<th>rows</thead>
<tbody></tbody></table>
<p>Ask: <code>curl -s HOST/predict -d '{"features": [...]}'</code></p>
<p id="note"></p>
<script>
function fill(id, rows) {
  const body = document.querySelector('#' + id + ' tbody');
  body.replaceChildren(...rows.map(cells => {
    const row = document.createElement('tr');
    for (const cell of cells) {
      const td = document.createElement('td');
      td.textContent = cell;
      if (['READY', 'UNAVAILABLE', 'LOADING'].includes(cell)) td.className = cell;
      row.append(td);
    }
    return row;
  }));
}
async function refresh() {
  const note = document.getElementById('note');
  try {
    const index = await (await fetch('/v2/repository/index', {method: 'POST'})).json();
    fill('models', index.map(m => [m.name, m.version ?? '', m.state, m.reason,
      m.drifting === null ? '' : m.drifting ? 'yes' : 'no', (m.digest ?? '').slice(7, 19)]));
    const metrics = await (await fetch('/metrics')).text();
    const label = (text, name) => (text.match(new RegExp(name + '="([^"]*)"')) ?? ['', ''])[1];
    fill('answers', metrics.split('\\n')
      .filter(line => line.startsWith('edge_answers_total{') && !line.endsWith(' 0.0'))
      .map(line => [label(line, 'source'), label(line, 'model'), label(line, 'version'),
        label(line, 'reason'), Number(line.slice(line.lastIndexOf(' ')))]));
    note.textContent = 'as of ' + new Date().toLocaleTimeString();
  } catch (error) {
    note.textContent = 'the agent does not answer: ' + error;
  }
  setTimeout(refresh, 2000);
}
refresh();
</script>
</html>
"""
