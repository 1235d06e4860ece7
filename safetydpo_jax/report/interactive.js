// The one script of a report: tables sort by a click on a heading, examples are filtered.
//
// An element with `data-groups` names the groups of the row or list item that contains
// it; what has all groups that are chosen in the bars with `data-filter` is shown.
// Headings become buttons and bars appear here, so that without the script nothing looks
// as if it worked.

const hidden = document.querySelectorAll('[data-filter]');
const pick = () => {
  const wanted = [...hidden].flatMap(bar => [...bar.querySelectorAll('select')])
    .map(select => select.value).filter(Boolean);
  let count = 0;
  for (const mark of document.querySelectorAll('[data-groups]')) {
    const groups = mark.dataset.groups.split(' ');
    const shown = wanted.every(group => groups.includes(group));
    mark.closest('tr, li').hidden = !shown;
    count += shown;
  }
  for (const bar of hidden) bar.querySelector('output').textContent = count + ' shown';
};
for (const bar of hidden) { bar.hidden = false; bar.addEventListener('change', pick); }
for (const table of document.querySelectorAll('table.sortable')) {
  const value = (row, column) => {
    const text = row.cells[column].textContent.replace('\u2212', '-').trim();
    const number = parseFloat(text.replace(/,/g, ''));
    return [Number.isNaN(number) ? -Infinity : number, text];
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') === 'descending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        const order = x[0] === y[0] ? x[1].localeCompare(y[1]) : x[0] - y[0];
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
