//! `keyward bench`: every load is answered rightly, and the figures are there for programs. How fast it is, is not judged.

use serde_json::Value;

use crate::process::{FinishedProcess, TestHome, read_text, wait_for};

fn bench_in(home: &TestHome, arguments: &[&str]) -> FinishedProcess {
    let few = ["--keys", "50", "--connections", "2", "--in-flight", "8", "--rounds", "2"];
    let short = ["--duration", "100ms", "--warm-up", "50ms", "--json"];
    home.run_to_end(home.command([&["bench"], arguments, &few, &short].concat()))
}

fn figures(arguments: &[&str]) -> Vec<Value> {
    figures_in(&TestHome::new(), arguments)
}

fn figures_in(home: &TestHome, arguments: &[&str]) -> Vec<Value> {
    let ended = bench_in(home, arguments);
    assert_eq!(ended.code, Some(0), "{arguments:?}: {ended:?}");
    let told: Value = serde_json::from_str(&ended.out).unwrap();
    told["figures"].as_array().unwrap().clone()
}

#[test]
fn every_load_is_answered_and_every_answer_is_the_right_one() {
    for mode in ["check", "batch", "stream", "create", "revoke", "ext-authz"] {
        for figures in figures(&[mode, "--unknown", "20", "--denied", "20"]) {
            assert!(figures["answered"].as_u64().unwrap() > 0, "{mode}: {figures}");
            assert_eq!((&figures["wrong"], &figures["failed"]), (&0.into(), &0.into()), "{mode}");
        }
    }
}

#[test]
fn an_overload_is_offered_in_shares_and_every_call_is_accounted_for() {
    let home = TestHome::new();
    let ended = bench_in(&home, &["overload"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let told: Value = serde_json::from_str(&ended.out).unwrap();
    assert!(told["capacity"].as_f64().unwrap() > 0.0);
    let steps = told["steps"].as_array().unwrap();
    let shares: Vec<_> = steps.iter().map(|step| step["share"].as_f64().unwrap()).collect();
    assert_eq!(shares, [0.5, 1.0, 1.2, 1.5, 2.0]);
    for step in steps {
        let of = |name: &str| step[name].as_f64().unwrap();
        assert!(of("goodput") > 0.0 && of("p50_ms") > 0.0 && of("p99_ms") >= of("p50_ms"), "{step}");
        assert!((0.0..=1.0).contains(&of("of_peak")) && (0.0..=1.0).contains(&of("unanswered")), "{step}");
        assert_eq!(step["wrong"], 0);
    }
}

#[test]
fn a_baseline_is_measured_in_turn_and_gives_ratios() {
    let figures = figures(&["check", "--baseline"]);
    assert_eq!(figures.len(), 3);
    let ratios = figures[0]["ratios"].as_array().unwrap();
    assert_eq!(ratios.len(), 2);
    assert!(ratios.iter().all(|ratio| ratio["rate"]["median"].as_f64().unwrap() > 0.0), "{ratios:?}");
    let program = ["check", "--baseline", "--baseline-program", env!("CARGO_BIN_EXE_keyward")];
    assert_eq!(self::figures(&program).len(), 5, "those of another program come on top");
}

#[test]
fn a_load_that_is_told_to_end_takes_its_server_along() {
    let home = TestHome::new();
    let bench = home.spawn(home.command(["bench", "check", "--keys", "50", "--duration", "10m"]));
    let id = bench.id();
    let server = wait_for("the load's server", || {
        let children = read_text(format!("/proc/{id}/task/{id}/children").as_ref());
        children.split_whitespace().next().map(str::to_owned)
    });
    bench.terminate();
    assert_eq!(bench.wait_until_ended().code, Some(143));
    assert!(!std::path::Path::new(&format!("/proc/{server}")).exists());
}

#[test]
fn two_settings_files_are_measured_in_turn_and_each_server_has_its_own() {
    let home = TestHome::new();
    for name in ["first", "second"] {
        let log = home.path(&format!("{name}.jsonl"));
        let settings = format!("[decision_log]\nfile = {:?}\nallowed = 1\n", log.display().to_string());
        std::fs::write(home.path(&format!("{name}.toml")), settings).unwrap();
    }
    let both = ["check", "--config", "first.toml", "--against", "second.toml"];
    let figures = figures_in(&home, &both);
    assert_eq!(figures.len(), 2);
    assert_eq!(figures[0]["ratios"][0]["to"], figures[1]["name"]);
    assert!(figures[1]["name"].as_str().unwrap().ends_with(" with second.toml"), "{figures:?}");
    for name in ["first.jsonl", "second.jsonl"] {
        assert!(read_text(&home.path(name)).contains("\"allowed\":true"), "{name}");
    }
}

#[test]
fn a_settings_file_that_a_server_refuses_ends_the_load_with_what_the_server_says() {
    let home = TestHome::new();
    std::fs::write(home.path("wrong.toml"), "[decision_log]\nallowed = 2\n").unwrap();
    for flag in ["--config", "--against"] {
        let ended = bench_in(&home, &["check", flag, "wrong.toml"]);
        assert!(ended.code != Some(0) && ended.err.contains("decision_log.allowed"), "{ended:?}");
        let ended = bench_in(&home, &["check", flag, "none.toml"]);
        assert!(ended.code == Some(2) && ended.err.contains("none.toml"), "{ended:?}");
    }
}

#[test]
fn calls_at_a_rate_are_as_many_as_the_rate_says() {
    let figures = figures(&["check", "--rate", "100"]);
    let answered = figures[0]["answered"].as_u64().unwrap();
    assert!((1..=40).contains(&answered), "{answered} in two tenths of a second");
}

#[test]
fn a_load_that_can_measure_nothing_is_refused_with_what_would_be_right() {
    let home = TestHome::new();
    for (flag, value, said) in [
        ("--in-flight", "5000", "1 to 256"),
        ("--connections", "0", "1 to 1000"),
        ("--rounds", "0", "1 to 10000"),
        ("--keys", "0", "1.."),
        ("--rate", "0", "0.1 to"),
        ("--unknown", "101", "0 to 100"),
    ] {
        let ended = home.run_to_end(home.command(["bench", "check", flag, value]));
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.err.contains(flag) && ended.err.contains(said), "{ended:?}");
    }
}
