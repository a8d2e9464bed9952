"""The report: a run, or several, drawn as one HTML file that needs no network.

    run.py        what a page shows of a run, and its curves as arrays
    thinning.py   few points for many, with their extremes
    curves.py     losses, rates and times over iterations
    presences.py  which rank was where, and when
    timeline.py   what nodes and ranks did, over time
    page.py       the HTML around the pictures: page.html is its template

Must not know where a run's records and checkpoints lie, nor how they are read: `commands/report_page.py` gathers them.
"""
