"""Tests of what needs no server: figures, tables, plots, outputs of tools, results files, processes."""

import json
import pathlib
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from dynibench import bolt, cli, compare, drift, host, parse, processes, render, results, stats, studies, svg  # noqa: E402
from dynibench.dyni import samplers  # noqa: E402
from dynibench.errors import BenchError, Skipped  # noqa: E402

SYSBENCH = """\
SQL statistics:
    queries performed:
        total:                           11712
    transactions:                        732    (729.07 per sec.)
    queries:                             11712  (11665.06 per sec.)
    ignored errors:                      0      (0.00 per sec.)
    reconnects:                          0      (0.00 per sec.)
"""
PGBENCH = """\
pgbench (15.18 (Debian 15.18-0+deb12u1))
transaction type: <builtin: select only>
number of transactions actually processed: 20645
number of failed transactions: 0 (0.000%)
latency average = 0.096 ms
"""
REDIS = """\
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"SET","319148.94","0.356","0.016","0.271","1.127","1.975","2.303"
"GET","352941.19","0.318","0.024","0.111","1.231","3.479","5.839"
"""
WRK = """\
Running 1s test @ http://127.0.0.1:45079/r/index.html
  1 threads and 8 connections
  28065 requests in 1.00s, 23.02MB read
Requests/sec:  28059.89
"""


def measured(*ratios):
    """A measurement of these rounds."""
    rounds = [{"operations": [9, 9], "ns_per_operation": [1, 1], "ratio": ratio} for ratio in ratios]
    return {**stats.summary(ratios), "rounds": rounds}


def example():
    """Results of everything."""
    made = results.fresh(
        {"date": "2026-01-02", "system": "Debian", "kernel": "6.1", "cpu": "A <fast> & quiet CPU", "cpus": 2},
        {"version": "0.1.0", "commit": "abc", "digest": "00"}, {"rounds": 3, "seconds": 5, "quick": False})
    before, after = measured(1.0, 0.99, 1.01), measured(1.1, 1.2, 1.15)
    gain = stats.gain(before, after)
    said = {"state": "dynimized", "gain": {"ratio": 1.14, "low": 1.1, "high": 1.2}, "not_measured": None}
    point = {"after": after, "gain": gain, "functions": 3}
    made["workloads"] = {
        "postgres": {"dyni": {"before": before, "after": after, "gain": gain, "optimize": said},
                     "bolt": {"skipped": "known to crash"}, "none": {"before": before, "after": before, "gain": gain}},
        "redis": {"dyni": {"failed": "redis B died with signal SIGSEGV\n  its log"}}}
    study = {"stock": before, "again": stats.gain(before, before)}
    made["length"] = {"postgres": {**study, "points": [{"label": "2 s", **point}, {"label": "5 s", **point}]}}
    made["method"] = {"postgres": {**study, "points": [{"label": "count", **point},
                                                       {"label": "lbr", "skipped": "no counters"}]}}
    sets = studies.pass_sets(["one", "two"])
    made["passes"] = {"postgres": {**study, "points": [{"kind": how, "pass": name, **point} for how, name, _ in sets]}}
    return made


class Figures(unittest.TestCase):
    def test_summary_is_median_and_range(self):
        self.assertEqual(stats.summary([3, 1, 2, 9]), {"median": 2.5, "low": 1, "high": 9})
        self.assertRaises(ValueError, stats.summary, [])

    def test_gain_is_after_over_the_median_before(self):
        gain = stats.gain(measured(0.8, 1.0, 9.0), measured(1.1, 1.2, 1.3))
        self.assertAlmostEqual(gain["median"], 1.2)
        self.assertAlmostEqual(gain["low"], 1.1)
        self.assertAlmostEqual(gain["high"], 1.3)

    def test_pass_sets_go_from_none_to_all_and_leave_out_each(self):
        self.assertEqual(list(studies.pass_sets(["a", "b", "c"])), [
            ("none", None, []), ("added", "a", ["a"]), ("added", "b", ["a", "b"]), ("added", "c", ["a", "b", "c"]),
            ("without", "a", ["b", "c"]), ("without", "b", ["a", "c"]), ("without", "c", ["a", "b"])])
        self.assertIn(("added", "c", ["a", "b", "c"]), list(studies.pass_sets(["a", "b", "c"], quick=True)))


class Drift(unittest.TestCase):
    """What `bench/drift` makes of its gains."""

    def test_the_share_is_of_the_fresh_gain(self):
        again = {"median": 1.09, "low": 1.08, "high": 1.10}
        fresh = {"median": 1.10, "low": 1.09, "high": 1.12}
        share = drift.recovered({"again": again, "fresh": fresh})
        self.assertAlmostEqual(share["median"], 0.9)
        self.assertAlmostEqual(share["low"], 0.08 / 0.12)
        self.assertAlmostEqual(share["high"], 0.10 / 0.09)

    def test_where_nothing_is_gained_there_is_nothing_to_recover(self):
        flat = {"median": 1.0, "low": 0.99, "high": 1.01}
        share = drift.recovered({"again": flat, "fresh": flat})
        self.assertIsNone(share["median"])
        self.assertIn("nothing to recover", drift.percent(share["median"]))


class Outputs(unittest.TestCase):
    def test_operations_are_counted(self):
        self.assertEqual(parse.sysbench(SYSBENCH), 732)
        self.assertEqual(parse.pgbench(PGBENCH), 20645)
        self.assertEqual(parse.redis_benchmark(REDIS, ("set", "get"), 500), 1000)
        self.assertEqual(parse.wrk(WRK), 28065)
        self.assertEqual(parse.redis_info("# Stats\r\ntotal_error_replies:7\r\n", "total_error_replies"), 7)

    def test_a_failed_operation_is_an_error(self):
        for parser, text in (
            (parse.sysbench, SYSBENCH + "FATAL: mysql_drv_query() returned error 2013 (Lost connection)\n"),
            (parse.sysbench, SYSBENCH.replace("reconnects:                          0", "reconnects: 1")),
            (parse.pgbench, PGBENCH.replace("transactions: 0 (0", "transactions: 3 (0")),
            (parse.pgbench, "pgbench: error: client 0 aborted in command 1\n" + PGBENCH),
            (parse.wrk, WRK + "  Socket errors: connect 0, read 3, write 0, timeout 0\n"),
            (parse.wrk, WRK + "  Non-2xx or 3xx responses: 12\n"),
            (lambda text: parse.redis_benchmark(text, ("set", "get"), 5), "Error from server: OOM\n" + REDIS),
        ):
            with self.subTest(text=text):
                self.assertRaises(BenchError, parser, text)

    def test_no_operation_and_no_output_are_errors(self):
        for parser in (parse.sysbench, parse.pgbench, parse.wrk):
            self.assertRaises(BenchError, parser, "")
        self.assertRaises(BenchError, parse.wrk, "0 requests in 1.00s")
        self.assertRaises(BenchError, parse.redis_benchmark, REDIS, ("set", "get", "hset"), 5)

    def test_samplers_of_doctor(self):
        doctor = {"host": [{"id": "lbr", "verdict": "limited", "found": "no counters"},
                           {"id": "clock", "verdict": "ok", "found": "works"}, {"id": "thp", "verdict": "ok", "found": ""}]}
        self.assertEqual(samplers(doctor), {"lbr": "no counters", "clock": None})

    def test_processor(self):
        text = "processor\t: 0\ncpu family\t: 26\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: other\n"
        self.assertEqual(host.processor(text), "AMD EPYC (family 26)")
        self.assertEqual(host.processor(""), "unknown processor")


class Tables(unittest.TestCase):
    def test_only_what_stands_between_the_markers_is_replaced(self):
        page = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n<!-- begin: y -->\nkept\n<!-- end: y -->\n"
        new = render.replace(page, "x", "new | \\1 table\n")
        self.assertEqual(new, page.replace("old", "new | \\1 table"))
        self.assertEqual(render.replace(new, "x", "new | \\1 table"), new)

    def test_markers_that_are_missing_doubled_or_swapped_are_an_error(self):
        begin, end = "<!-- begin: x -->\n", "<!-- end: x -->\n"
        for page in ("", begin, end, begin + begin + end, end + begin):
            with self.subTest(page=page):
                self.assertRaises(BenchError, render.replace, page, "x", "new")

    def test_readme_has_a_place_for_every_table(self):
        page = (cli.BENCH / "README.md").read_text(encoding="utf-8")
        made = render.blocks(example())
        self.assertEqual(set(made), {"workloads", "passes", "length", "method"})
        for name, body in made.items():
            page = render.replace(page, name, body)
        for body in made.values():
            self.assertIn(body, page)

    def test_workloads(self):
        body = render.blocks(example())["workloads"]
        self.assertIn("Taken on 2026-01-02, A <fast> & quiet CPU, 2 CPUs, Debian, Linux 6.1; dyni 0.1.0, commit abc;", body)
        self.assertIn("| postgres | **1.150** | 1.100 to 1.200 | 1.140 | skipped | 1.150 (1.100 to 1.200) |", body)
        self.assertIn("postgres, bolt: SKIPPED: known to crash", body)
        # A failure shows no figure.
        self.assertIn("| redis | failed |  |  |  |  |", body)
        self.assertIn("redis, dyni: FAILED: redis B died with signal SIGSEGV", body)

    def test_what_was_taken_out_again_is_said(self):
        made = example()
        made["workloads"]["postgres"]["dyni"]["optimize"].update(state="undynimized", gain={"ratio": 0.98})
        self.assertIn("| 0.980, undynimized |", render.blocks(made)["workloads"])

    def test_studies(self):
        made = render.blocks(example())
        self.assertIn("| two | 1.150 (1.100 to 1.200) | 1.150 (1.100 to 1.200) | +0.0 % |", made["passes"])
        self.assertIn("| workload | 2 s | 5 s | stock again |", made["length"])
        self.assertIn("branch stacks (LBR): SKIPPED: no counters.", made["method"])

    def test_tables_are_rectangular(self):
        for body in render.blocks(example()).values():
            widths = {line.count("|") for line in body.splitlines() if line.startswith("|")}
            self.assertEqual(len(widths), 1, body)


class Plots(unittest.TestCase):
    def test_plots_are_well_formed_and_hold_every_point(self):
        made = render.plots(example())
        self.assertEqual(set(made), {"length.svg", "method.svg"})
        for name, points in (("length.svg", 2), ("method.svg", 1)):
            root = ElementTree.fromstring(made[name])
            self.assertEqual(root.tag, "{http://www.w3.org/2000/svg}svg")
            # One more in the legend.
            self.assertEqual(len(root.findall("{http://www.w3.org/2000/svg}circle")), points + 1)
            self.assertIn("A <fast> & quiet CPU", "".join(root.itertext()))
        self.assertIn("SKIPPED: no counters", " ".join(ElementTree.fromstring(made["method.svg"]).itertext()))

    def test_every_point_lies_in_the_frame(self):
        wild = {"median": 0.2, "low": -0.4, "high": 7.5}
        for row in ([wild, None], [None, None], [{"median": 1.0, "low": 1.0, "high": 1.0}, wild]):
            root = ElementTree.fromstring(svg.plot('"a" < b', "", ("x", "y"), ["1", "2"], {"s": row}))
            for circle in root.findall("{http://www.w3.org/2000/svg}circle"):
                self.assertTrue(0 <= float(circle.get("cx")) <= svg.WIDTH and 0 <= float(circle.get("cy")) <= svg.HEIGHT)

    def test_scale_holds_its_range_in_few_steps(self):
        for low, high in ((1, 1), (0.98, 1.17), (0.2, 7.5), (1, 1.004), (-3, 900), (1, 30_000)):
            ticks = svg.scale(low, high)
            self.assertLessEqual(ticks[0], low + 1e-6)
            self.assertGreaterEqual(ticks[-1], high - 1e-6)
            self.assertTrue(2 <= len(ticks) <= 11, ticks)


class Files(unittest.TestCase):
    def test_results_are_kept_and_continued(self):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/r.json"
            made = example()
            self.assertIs(results.continued(path, made), made)
            results.save(path, made)
            self.assertEqual(results.load(path), json.loads(json.dumps(made)))
            later = example()
            later.update(workloads={}, dates=["2026-01-05", "2026-01-05"])
            both = results.continued(path, later)
            self.assertEqual(both["dates"], ["2026-01-02", "2026-01-05"])
            self.assertIn("postgres", both["workloads"])
            later["host"]["kernel"] = "6.2"
            self.assertRaises(BenchError, results.continued, path, later)

    def test_a_run_of_some_workloads_knows_what_it_lacks(self):
        missing = cli.absent(example())
        self.assertNotIn("postgres", missing)
        # It was tried, and failed.
        self.assertIn("redis", missing)

    def test_what_is_no_results_file_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "r.json")
            self.assertRaises(BenchError, results.load, path)
            for text in ("", "{", "[]", '{"format": 99}'):
                path.write_text(text)
                self.assertRaises(BenchError, results.load, path)


class Programs(unittest.TestCase):
    def test_cpu_time_counts_children_that_ended(self):
        burn = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
        parent = ("import subprocess, sys, time\n"
                  f"subprocess.run([sys.executable, '-I', '-c', {burn!r}])\nprint(flush=True)\ntime.sleep(60)")
        with processes.Processes() as started:
            process = started.start([sys.executable, "-I", "-c", parent])
            process.stdout.readline()
            self.assertGreater(processes.cpu_ns(process.pid), 180_000_000)
        self.assertIsNotNone(process.poll())

    def test_the_end_stops_a_process_and_what_it_started(self):
        parent = ("import subprocess, time\n"
                  "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\ntime.sleep(60)")
        with processes.Processes() as started:
            process = started.start([sys.executable, "-I", "-c", parent])
            child = int(process.stdout.readline())
        end = time.monotonic() + 5
        while processes.tree(child).get(child) and processes.stat(child)[0] != "Z" and time.monotonic() < end:
            time.sleep(0.02)
        self.assertTrue(not processes.tree(child) or processes.stat(child)[0] == "Z")

    def test_a_failing_command_is_an_error_with_its_output(self):
        with processes.Processes() as started:
            with self.assertRaisesRegex(BenchError, "(?s)sh failed with status 3.*the reason"):
                started.run(["sh", "-c", "echo the reason; exit 3"])
            self.assertRaises(BenchError, started.run, ["/nonexistent/program"])

    def test_a_known_crash_is_not_tried_unasked(self):
        class Bench:
            try_crashing = False

        try:
            bolt.tools()
        except Skipped as reason:
            self.skipTest(str(reason))
        with self.assertRaisesRegex(Skipped, "known to crash"):
            compare.with_bolt(Bench, cli.WORKLOADS["postgres"])

    def test_the_python_loop_computes_what_eval_does(self):
        from dynibench import pyloop
        for text in pyloop.texts():
            self.assertEqual(pyloop.Parser(text).sum().evaluate(), eval(text))


if __name__ == "__main__":
    unittest.main()
