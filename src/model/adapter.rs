//! Which modules get a low-rank pair, and where it lies in the adapter's flat arena.
//!
//! The arena's order is the checkpoint's: layer, module, A then B, experts outermost; each tensor is padded to 256
//! elements, so that shards over devices are slices.

use std::ops::Range;

use crate::config::{MoeLora, TrainConfig};
use crate::error::{Error, Result};
use crate::ops::{ExpertsLora, LoraPair};
use crate::random::{Draws, Stream};

/// Elements each tensor of the arena is padded to.
const PADDING: usize = 256;

/// The adapter settings of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSettings {
    /// Rank.
    pub rank: usize,
    /// Rank of the routed experts' pairs.
    pub expert_rank: usize,
    /// `scaling = alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`.
    pub alpha: f64,
    /// Dropout on the pair's input.
    pub dropout: f64,
    /// Rank-stabilised scaling.
    pub use_rslora: bool,
    /// Module name suffixes.
    pub target_modules: Vec<String>,
    /// Which mixture-of-experts modules take part.
    pub moe_lora: MoeLora,
}

impl AdapterSettings {
    /// The settings of `config`.
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            rank: config.lora_r,
            expert_rank: config.lora_expert_r.unwrap_or(config.lora_r),
            alpha: config.lora_alpha,
            dropout: config.lora_dropout,
            use_rslora: config.use_rslora,
            target_modules: config.lora_target_modules.clone(),
            moe_lora: config.moe_lora,
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the scaling is used in f32"
    )]
    /// Factor on the product of a pair of `rank`.
    pub fn scaling(&self, rank: usize) -> f32 {
        let rank = rank as f64;
        (self.alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// Part of the model a module belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Attention, DeltaNet or a dense MLP.
    Plain,
    /// A routed expert.
    Expert,
    /// The shared expert.
    SharedExpert,
}

/// A module with a pair.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// Name in the checkpoint, without `.weight`.
    pub name: String,
    /// Its place.
    pub pair: LoraPair,
}

/// All pairs of a run.
#[derive(Debug, Clone)]
pub struct AdapterLayout {
    settings: AdapterSettings,
    modules: Vec<LoraModule>,
    matched: Vec<bool>,
    has_experts: bool,
    len: usize,
}

impl AdapterLayout {
    /// No pairs yet.
    pub fn new(settings: AdapterSettings) -> Self {
        let matched = vec![false; settings.target_modules.len()];
        Self {
            settings,
            modules: Vec::new(),
            matched,
            has_experts: false,
            len: 0,
        }
    }

    /// Gives module `name` a pair if it is a target.
    pub fn register(
        &mut self,
        name: &str,
        role: Role,
        out_features: usize,
        in_features: usize,
    ) -> Option<LoraPair> {
        let target = self.settings.target_modules.iter().position(|target| {
            name == target
                || name
                    .strip_suffix(target.as_str())
                    .is_some_and(|head| head.ends_with('.'))
        })?;
        self.matched[target] = true;
        let wanted = match (role, self.settings.moe_lora) {
            (Role::Plain, _) | (_, MoeLora::All) | (Role::SharedExpert, MoeLora::SharedOnly) => {
                true
            }
            (Role::Expert, MoeLora::SharedOnly) | (_, MoeLora::None) => false,
        };
        if !wanted {
            return None;
        }
        let rank = if role == Role::Expert {
            self.settings.expert_rank
        } else {
            self.settings.rank
        };
        let a = self.take(rank * in_features);
        let b = self.take(rank * out_features);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the probability is used in f32"
        )]
        let dropout = self.settings.dropout as f32;
        let module = u32::try_from(self.modules.len()).unwrap_or(u32::MAX);
        let scaling = self.settings.scaling(rank);
        let pair = LoraPair {
            a,
            b,
            rank,
            in_features,
            out_features,
            scaling,
            dropout,
            module,
        };
        self.modules.push(LoraModule {
            name: name.to_owned(),
            pair,
        });
        Some(pair)
    }

    /// Pairs of all experts under `prefix` (`model.layers.N.mlp.experts`), in expert order.
    pub fn register_experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        intermediate_size: usize,
        hidden_size: usize,
    ) -> ExpertsLora {
        self.has_experts = true;
        let (start, first_module) = (self.len, self.modules.len());
        let mut lora = ExpertsLora::default();
        for expert in 0..num_experts {
            let mut one = |projection: &str, out_features, in_features| {
                let name = format!("{prefix}.{expert}.{projection}");
                self.register(&name, Role::Expert, out_features, in_features)
            };
            let gate = one("gate_proj", intermediate_size, hidden_size);
            let up = one("up_proj", intermediate_size, hidden_size);
            let down = one("down_proj", hidden_size, intermediate_size);
            if expert == 0 {
                let module_stride = self.modules.len() - first_module;
                let module_stride = u32::try_from(module_stride).unwrap_or(u32::MAX);
                lora = ExpertsLora {
                    gate,
                    up,
                    down,
                    stride: self.len - start,
                    module_stride,
                };
            }
        }
        lora
    }

    /// Whether the model has routed experts, with an adapter or without.
    pub fn has_experts(&self) -> bool {
        self.has_experts
    }

    fn take(&mut self, len: usize) -> usize {
        let start = self.len;
        self.len += len.next_multiple_of(PADDING);
        start
    }

    /// Checks that each target names some module of the model.
    ///
    /// # Errors
    /// [`Error::Config`] naming the targets that match nothing, or that nothing is left to train.
    pub fn verify(&self) -> Result<()> {
        let targets = self.settings.target_modules.iter().zip(&self.matched);
        let unmatched: Vec<String> = targets
            .filter(|(_, matched)| !**matched)
            .map(|(name, _)| format!("`{name}`"))
            .collect();
        let reason = if unmatched.is_empty() {
            if !self.modules.is_empty() {
                return Ok(());
            }
            "`lora_target_modules` and `moe_lora` leave nothing to train; name at least one module"
                .to_owned()
        } else {
            format!(
                "`lora_target_modules` names {}, which no module of this model is called; remove it",
                unmatched.join(", ")
            )
        };
        Err(Error::Config {
            origin: "adapter".to_owned(),
            reason,
        })
    }

    /// Digest of every tensor's name and place: two runs with the same digest have interchangeable arenas.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, range) in self.tensors() {
            hasher.update(format!("{name} {range:?}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The settings it was made from.
    pub fn settings(&self) -> &AdapterSettings {
        &self.settings
    }

    /// All modules, in arena order.
    pub fn modules(&self) -> &[LoraModule] {
        &self.modules
    }

    /// Elements of the arena, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// Elements that are trained.
    pub fn num_parameters(&self) -> usize {
        let sizes = self
            .modules
            .iter()
            .map(|module| module.pair.rank * (module.pair.in_features + module.pair.out_features));
        sizes.sum()
    }

    /// Name and range of every tensor, in arena order: `<module>.lora_A.weight`, `<module>.lora_B.weight`.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Range<usize>)> + '_ {
        self.modules.iter().flat_map(|module| {
            let name = |which: char| format!("{}.lora_{which}.weight", module.name);
            [
                (name('A'), module.pair.a_range()),
                (name('B'), module.pair.b_range()),
            ]
        })
    }

    /// PEFT's initialisation: `A` uniform in `+-1/sqrt(in_features)`, `B` zero. Places and values of the `A`s, one by one: all of a
    /// large adapter need not fit beside it.
    pub fn initial_values(&self, seed: u64) -> impl Iterator<Item = (Range<usize>, Vec<f32>)> + '_ {
        self.modules.iter().map(move |module| {
            let mut draws = Draws::new(seed, Stream::Init, u64::from(module.pair.module));
            let bound = 1.0 / (module.pair.in_features as f32).sqrt();
            let range = module.pair.a_range();
            let values = range
                .clone()
                .map(|_| bound * (2.0 * draws.next_f32() - 1.0));
            (range, values.collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(targets: &[&str], moe_lora: MoeLora) -> AdapterSettings {
        AdapterSettings {
            rank: 4,
            expert_rank: 2,
            alpha: 8.0,
            dropout: 0.0,
            use_rslora: false,
            target_modules: targets.iter().map(|&target| target.to_owned()).collect(),
            moe_lora,
        }
    }

    #[test]
    fn targets_match_whole_path_components() {
        let mut layout = AdapterLayout::new(settings(&["gate_proj", "mlp.up_proj"], MoeLora::All));
        assert!(
            layout
                .register("model.layers.0.mlp.gate_proj", Role::Plain, 8, 8)
                .is_some()
        );
        assert!(
            layout
                .register("model.layers.0.mlp.big_gate_proj", Role::Plain, 8, 8)
                .is_none()
        );
        assert!(
            layout
                .register("model.layers.0.mlp.up_proj", Role::Plain, 8, 8)
                .is_some()
        );
        assert!(
            layout
                .register("model.layers.0.xmlp.up_proj", Role::Plain, 8, 8)
                .is_none()
        );
    }

    #[test]
    fn expert_pairs_are_a_constant_step_apart_and_use_the_expert_rank() {
        let targets = ["gate_proj", "down_proj"];
        let mut layout = AdapterLayout::new(settings(&targets, MoeLora::All));
        layout.register(
            "model.layers.0.mlp.shared_expert.gate_proj",
            Role::SharedExpert,
            8,
            8,
        );
        let lora = layout.register_experts("model.layers.0.mlp.experts", 3, 6, 10);
        assert_eq!(lora.up, None);
        for expert in 0..3 {
            let name = format!("model.layers.0.mlp.experts.{expert}.down_proj");
            let module = layout.modules().iter().find(|module| module.name == name);
            assert_eq!(lora.of(lora.down, expert), module.map(|module| module.pair));
            assert_eq!(module.map(|module| module.pair.rank), Some(2));
        }
    }

    #[test]
    fn moe_lora_leaves_out_what_it_says() {
        for (mode, expert, shared) in [
            (MoeLora::All, true, true),
            (MoeLora::SharedOnly, false, true),
            (MoeLora::None, false, false),
        ] {
            let mut layout = AdapterLayout::new(settings(&["up_proj"], mode));
            assert_eq!(
                layout.register("e.up_proj", Role::Expert, 4, 4).is_some(),
                expert
            );
            assert_eq!(
                layout
                    .register("s.up_proj", Role::SharedExpert, 4, 4)
                    .is_some(),
                shared
            );
            assert!(layout.register("m.up_proj", Role::Plain, 4, 4).is_some());
        }
    }

    #[test]
    fn a_target_that_matches_nothing_is_named() {
        let mut layout = AdapterLayout::new(settings(&["q_proj", "qq_proj"], MoeLora::All));
        layout.register("a.q_proj", Role::Plain, 4, 4);
        let message = layout.verify().unwrap_err().to_string();
        assert_eq!(
            message,
            "config adapter: `lora_target_modules` names `qq_proj`, which no module of this model is called; \
             remove it"
        );
    }
}
