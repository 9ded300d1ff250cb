//! The data set of a run: read, tokenised, split, reported.

use std::path::Path;

use super::calendar::Date;
use super::pack::Packing;
use super::records::{Body, Records};
use super::report::Report;
use super::sequences::{Rules, units};
use super::tokenizer::Tokenizer;
use super::{IGNORE_INDEX, Unit};
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::random::{Draws, Stream};

/// Units to train on and to hold out.
#[derive(Debug)]
pub struct Dataset {
    /// To train on, in the order of the files.
    pub train: Vec<Unit>,
    /// Held out.
    pub eval: Vec<Unit>,
    /// What was found.
    pub report: Report,
    /// Text of the chat template that was used.
    pub chat_template: Option<String>,
}

impl Dataset {
    /// Reads and tokenises the data sets of `config` for the model in `model_dir`; `today` is the date that chat
    /// templates tell.
    ///
    /// # Errors
    /// [`Error::Data`] if nothing can be trained on, [`Error::Missing`] for an absent file, [`Error::Config`] if the
    /// held-out share leaves nothing.
    pub fn load(
        config: &TrainConfig,
        model_dir: &Path,
        vocab_size: usize,
        today: Date,
    ) -> Result<Self> {
        let records = Records::read(&config.datasets)?;
        let is_chat = |body: &Body| matches!(body, Body::Chat { .. });
        let is_tokens = |body: &Body| matches!(body, Body::Tokens { .. });
        let bodies = || records.records.iter().map(|record| &record.body);
        let tokenizer = if bodies().all(is_tokens) {
            // Token rows need none; with one, the report can show their text.
            Tokenizer::open(model_dir).ok()
        } else {
            Some(Tokenizer::open(model_dir)?)
        };
        let template = match &tokenizer {
            Some(tokenizer) if bodies().any(is_chat) => {
                Some(tokenizer.chat_template(config.chat_template.as_deref(), today)?)
            }
            _ => None,
        };
        let rules = Rules {
            sequence_len: config.sequence_len,
            fold: config.fold_conversations,
            train_on_inputs: config.train_on_inputs,
            vocab_size,
        };
        let made = units(
            &records.records,
            rules,
            tokenizer.as_ref(),
            template.as_ref(),
        )?;
        let paths: Vec<_> = config
            .datasets
            .iter()
            .map(|source| source.path.clone())
            .collect();
        let merges_system = template
            .as_ref()
            .is_some_and(super::template::ChatTemplate::merges_system);
        let report = Report::new(paths, &records, &made, merges_system, tokenizer.as_ref());
        if made.units.is_empty() {
            return Err(report.nothing_to_train());
        }
        let (train, eval) = split(made.units, config)?;
        let chat_template = template.map(|template| template.source().to_owned());
        Ok(Self {
            train,
            eval,
            report,
            chat_template,
        })
    }

    /// How the units become steps.
    pub fn packing(config: &TrainConfig) -> Packing {
        Packing {
            micro_batch_size: config.micro_batch_size,
            gradient_accumulation_steps: config.gradient_accumulation_steps,
            sample_packing: config.sample_packing,
            shuffle_seed: config.shuffle.then_some(config.seed),
        }
    }

    /// Digest of every token and label in order: two runs with the same digest train on the same data.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for unit in self
            .train
            .iter()
            .chain([&Unit::default()])
            .chain(&self.eval)
        {
            hasher.update(&(unit.input_ids.len() as u64).to_le_bytes());
            hasher.update(bytemuck::cast_slice(&unit.input_ids));
            hasher.update(bytemuck::cast_slice(&unit.labels));
            for end in &unit.target_ends {
                hasher.update(&(*end as u64).to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Holds out whole conversations, drawn by the seed.
fn split(units: Vec<Unit>, config: &TrainConfig) -> Result<(Vec<Unit>, Vec<Unit>)> {
    if config.val_set_size == 0.0 {
        return Ok((units, Vec::new()));
    }
    let mut groups: Vec<usize> = units.iter().map(|unit| unit.group).collect();
    groups.sort_unstable();
    groups.dedup();
    let size = config.val_set_size;
    let wanted = if size < 1.0 {
        (size * groups.len() as f64).round().max(1.0)
    } else {
        size
    };
    if wanted >= groups.len() as f64 {
        let reason = format!(
            "`val_set_size` is {size}, which holds out {wanted} of {} conversations and leaves none to train on",
            groups.len()
        );
        return Err(Error::Config {
            origin: "data".to_owned(),
            reason,
        });
    }
    Draws::new(config.seed, Stream::Split, 0).shuffle(&mut groups);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole, and less than the number of groups"
    )]
    let held_out = &groups[..wanted as usize];
    Ok(units
        .into_iter()
        .partition(|unit| !held_out.contains(&unit.group)))
}

/// Whether `label` is learnt.
pub(super) fn is_learnt(label: i32) -> bool {
    label != IGNORE_INDEX
}
