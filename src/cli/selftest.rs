//! `brightrun selftest`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use brightrun::backend;
use brightrun::config::{Device, Env};
use brightrun::error::Result;
use brightrun::selftest::{Case, Report, Subject, cases_of};
use serde_json::{Value, json};

use super::SelftestArguments;
use super::console::print;

pub(super) fn run(arguments: &SelftestArguments) -> Result<ExitCode> {
    let cases = cases_of(arguments.op.as_deref().unwrap_or_default());
    if arguments.list {
        let names: Vec<String> = cases.iter().map(Case::name).collect();
        print(&if arguments.json {
            format!("{}\n", json!(names))
        } else {
            format!("{}\n", names.join("\n"))
        });
        return Ok(ExitCode::SUCCESS);
    }
    let (note, subject) = open(arguments.device)?;
    if !arguments.json {
        print(&format!("{note}\n{HEADER}"));
    }
    let begun = Instant::now();
    let (mut results, mut num_failed) = (Vec::new(), 0);
    for case in &cases {
        let begun = Instant::now();
        let result = case.check(&subject);
        num_failed += usize::from(result.is_err());
        if arguments.json {
            results.push(to_json(case, &result, begun.elapsed()));
        } else {
            print(&line(case, &result, arguments.device));
        }
    }
    if arguments.json {
        let all = json!({"device": note, "num_cases": cases.len(), "num_failed": num_failed, "cases": results});
        print(&format!("{all}\n"));
    } else {
        let (count, seconds) = (cases.len(), begun.elapsed().as_secs_f64());
        print(&format!(
            "{count} cases, {num_failed} failed, {seconds:.1} s\n"
        ));
    }
    Ok(ExitCode::from(u8::from(num_failed > 0)))
}

/// The device, and what it is, for a person.
fn open(device: Device) -> Result<(String, Subject)> {
    if device == Device::Emu {
        let note = "device: emu, each case in three orders of its threads".to_owned();
        return Ok((note, Subject::emu()?));
    }
    let opened = backend::open(device, &Env::read())?;
    Ok((opened.note, Subject::new(opened.ops)))
}

const HEADER: &str = "status    error    limit  reruns  guards  case\n";

/// The relative error that comes nearest to its limit, and that limit; `None` for integers alone, which are equal.
fn worst(report: &Report) -> Option<(f64, f64)> {
    let pairs = report.errors.iter();
    let pairs = pairs.flat_map(|e| [(e.l2, e.l2_limit), (e.max, e.max_limit)]);
    pairs.max_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)))
}

fn line(case: &Case, result: &Result<Report>, device: Device) -> String {
    let report = match result {
        Ok(report) => report,
        Err(error) => return format!("FAILED  {error}\n"),
    };
    let (error, limit) = match worst(report) {
        Some((error, limit)) => (format!("{error:.1e}"), format!("{limit:.1e}")),
        None => ("exact".to_owned(), "exact".to_owned()),
    };
    let reruns = format!("{} equal", report.num_equal_reruns);
    let guards = match report.num_guarded {
        // The emulated device has guard bands of its own; the CPU's tensors are checked by the compiler.
        0 if device == Device::Emu => "own".to_owned(),
        0 => "none".to_owned(),
        count => format!("{count} ok"),
    };
    format!(
        "ok      {error:>7}  {limit:>7} {reruns:>7} {guards:>7}  {}\n",
        case.name()
    )
}

fn to_json(case: &Case, result: &Result<Report>, elapsed: Duration) -> Value {
    let mut all = json!({"case": case.name(), "op": case.op, "ok": result.is_ok(), "seconds": elapsed.as_secs_f64()});
    match result {
        Err(error) => all["failure"] = json!(error.to_string()),
        Ok(report) => {
            all["num_equal_reruns"] = json!(report.num_equal_reruns);
            all["num_guarded_tensors"] = json!(report.num_guarded);
            let one = |error: &brightrun::selftest::OutputError| {
                json!({
                    "output": error.name, "l2": error.l2, "l2_limit": error.l2_limit, "max": error.max,
                    "max_limit": error.max_limit,
                })
            };
            all["errors"] = report.errors.iter().map(one).collect();
        }
    }
    all
}
