//! `brightrun plan`.

use std::process::ExitCode;

use brightrun::backend;
use brightrun::config::{Device, Env};
use brightrun::error::{DOES_NOT_FIT, Result};
use brightrun::plan::{self, Place, Plan, Subject};

use super::PlanArguments;
use super::console::print;

pub(super) fn run(arguments: &PlanArguments) -> Result<ExitCode> {
    let config = arguments.config.load()?;
    let env = Env::read();
    let place = match &arguments.gpu {
        Some(name) => Place::Gpu(plan::parse(name)?),
        None => here(config.device, &env)?,
    };
    let subject = Subject::new(config, &env)?;
    let plan = Plan::new(&subject, place)?;
    let advice = if plan.fits() {
        None
    } else {
        Some(plan::advise(&subject, &plan)?)
    };
    if arguments.json {
        print(&format!("{:#}\n", plan.json(advice.as_ref())));
    } else {
        print(&plan.text(&subject));
        if let Some(advice) = &advice {
            print(&format!("\n{advice}"));
        }
    }
    Ok(if plan.fits() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(DOES_NOT_FIT)
    })
}

/// Where a run with `device` would go on this machine. The emulated device stands for a GPU with this machine's memory.
pub(super) fn here(device: Device, env: &Env) -> Result<Place> {
    let opened = backend::open(device, env)?;
    Ok(match (opened.info, opened.ops.free_memory()?) {
        (Some(info), Some(free)) => Place::Gpu(plan::GpuKind::of(&info, free)),
        _ => Place::cpu(),
    })
}
