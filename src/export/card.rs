//! `README.md` of an adapter: what it is and how to use it. No data, no paths, no names of people.

use super::Adapter;
use crate::config::TrainConfig;

/// What a run came to, for the card.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Summary {
    /// Optimizer steps.
    pub steps: u64,
    /// Mean loss per target token of the last epoch; `None` before the first step.
    pub final_loss: Option<f64>,
    /// Mean loss of the held-out data at the end.
    pub eval_loss: Option<f64>,
}

/// The card in Markdown, with the header that model hubs read.
pub(super) fn card(
    adapter: &Adapter<'_>,
    config: &TrainConfig,
    id: &str,
    summary: Summary,
) -> String {
    let settings = adapter.layout.settings();
    let mut results = format!("- optimizer steps: {}\n", summary.steps);
    if let Some(loss) = summary.final_loss {
        results.push_str(&format!(
            "- training loss, mean over the last epoch: {loss:.4}\n"
        ));
    }
    if let Some(loss) = summary.eval_loss {
        results.push_str(&format!("- held-out loss: {loss:.4}\n"));
    }
    let quantised = match config.adapter {
        crate::config::AdapterKind::Qlora => "NF4 (4-bit)",
        crate::config::AdapterKind::Lora => "as stored",
    };
    format!(
        "---\nbase_model: {id}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n\
         # LoRA adapter for {id}\n\n\
         Trained with brightrun {version}.\n\n\
         ## Training\n\n\
         - base weights: {quantised}\n\
         - rank {rank}, alpha {alpha}, dropout {dropout}{rslora}\n\
         - target modules: {targets}\n\
         - learning rate {lr} ({scheduler}), {batch} targets per step, {epochs} epochs, seed {seed}\n\
         - trained parameters: {parameters}\n\
         {results}\n\
         ## Use\n\n\
         ```python\n\
         from peft import PeftModel\n\
         from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         base = AutoModelForCausalLM.from_pretrained(\"{id}\", dtype=\"auto\")\n\
         model = PeftModel.from_pretrained(base, \"path/to/this/adapter\")\n\
         tokenizer = AutoTokenizer.from_pretrained(\"path/to/this/adapter\")\n\
         ```\n\n\
         With vLLM: `vllm serve {id} --enable-lora --max-lora-rank {file_rank} --lora-modules \
         adapter=path/to/this/adapter`\n",
        version = env!("CARGO_PKG_VERSION"),
        rank = settings.rank,
        alpha = settings.alpha,
        dropout = settings.dropout,
        rslora = if settings.use_rslora {
            ", rank-stabilised"
        } else {
            ""
        },
        targets = settings.target_modules.join(", "),
        lr = config.learning_rate,
        scheduler = config.lr_scheduler.name(),
        batch = config.micro_batch_size * config.gradient_accumulation_steps,
        epochs = config.num_epochs,
        seed = config.seed,
        parameters = adapter.layout.num_parameters(),
        file_rank = adapter.file_rank(),
    )
}
