//! `brightrun check`.

use std::process::ExitCode;

use brightrun::config::Env;
use brightrun::error::Result;
use brightrun::train::Prepared;

use super::ConfigArguments;
use super::console::print;

pub(super) fn run(arguments: &ConfigArguments) -> Result<ExitCode> {
    let config = arguments.load()?;
    let prepared = Prepared::new(&config, &Env::read())?;
    let model = &prepared.model;
    let mut text = format!(
        "model          {}, {} layers, hidden size {}, {:.1} MB on disk\n\
         base weights   {}\n\
         adapter        {} parameters in {} modules\n",
        model.model_type,
        model.layers.len(),
        model.hidden_size,
        prepared.weights.num_bytes() as f64 / 1e6,
        prepared.counts,
        prepared.layout.num_parameters(),
        prepared.layout.modules().len(),
    );
    text.push_str(&format!(
        "steps          {} ({} per epoch of {} targets), at most {} tokens in a pass\n",
        prepared.total_steps,
        prepared.steps_per_epoch,
        prepared
            .data
            .train
            .iter()
            .map(|unit| unit.target_ends.len())
            .sum::<usize>(),
        prepared.capacity,
    ));
    if !prepared.data.eval.is_empty() {
        text.push_str(&format!(
            "held out       {} sequences\n",
            prepared.data.eval.len()
        ));
    }
    if let Some(loaded) = &prepared.resume {
        let path = loaded.path.display();
        text.push_str(&format!(
            "goes on from   {path} (step {})\n",
            loaded.state.step
        ));
    }
    for warning in &prepared.warnings {
        text.push_str(&format!("warning        {warning}\n"));
    }
    text.push_str(&prepared.data.report.to_string());
    print(&text);
    Ok(ExitCode::SUCCESS)
}
