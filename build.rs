//! Compiles `kernels/*.cu`: with the host's C++ compiler for the emulated device, with nvcc (where there is one) for CUDA.
//!
//! nvcc is looked for as `NVCC`, in `CUDA_HOME`, in `PATH`, and below `.cuda/` (`scripts/get-nvcc.sh`).
//! `BRIGHTRUN_KERNELS=require` makes its absence an error. `BRIGHTRUN_CUDA_ARCHS` names the architectures.
//! `BRIGHTRUN_EMU_SANITIZE=1` builds the emulated device with sanitizers.

#![expect(
    clippy::disallowed_methods,
    reason = "a build script is told by its environment"
)]

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What CI compiles for.
const DEFAULT_ARCHS: &str = "80,90a";

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=kernels");
    for name in [
        "NVCC",
        "CUDA_HOME",
        "BRIGHTRUN_KERNELS",
        "BRIGHTRUN_CUDA_ARCHS",
        "BRIGHTRUN_EMU_SANITIZE",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let kernels = files("kernels", "cu")?;
    if env::var_os("CARGO_FEATURE_EMU").is_some() {
        compile_emulated(&kernels, &out)?;
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_cuda(&kernels, &out)?;
    }
    #[cfg(feature = "regen-bindings")]
    bindings::write()?;
    Ok(())
}

/// Files of a directory with an extension, sorted.
fn files(dir: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// A static library of all kernels, and `emu_kernels.rs`, which lists them.
fn compile_emulated(kernels: &[PathBuf], out: &Path) -> Result<()> {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include("kernels")
        .opt_level(2)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .flag("-ffp-contract=off");
    if env::var_os("BRIGHTRUN_EMU_SANITIZE").is_some() {
        // The tests run with AddressSanitizer and UndefinedBehaviorSanitizer in the kernels.
        for flag in [
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-g",
        ] {
            build.flag(flag);
        }
        println!("cargo:rustc-cfg=kernels_sanitized");
        println!("cargo:rustc-link-lib=asan");
        println!("cargo:rustc-link-lib=ubsan");
    }
    let mut table = String::new();
    let mut declarations = String::new();
    for path in kernels {
        let mut one = build.clone();
        let text = one.flag("-xc++").file(path).try_expand()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        for name in kernel_names(&text) {
            writeln!(
                declarations,
                "    fn {name}_emu(launch: *const Launch, first: u64, count: u64, error: *mut u8, error_bytes: usize) -> i32;"
            )?;
            writeln!(table, "    ({name:?}, {name}_emu),")?;
        }
    }
    let text = format!(
        "unsafe extern \"C\" {{\n{declarations}}}\n/// Every kernel, by name.\nconst KERNELS: &[(&str, Entry)] = &[\n{table}];\n"
    );
    fs::write(out.join("emu_kernels.rs"), text)?;
    build
        .clone()
        .flag("-xc++")
        .files(kernels)
        .try_compile("brightrun_emu_kernels")?;
    build
        .file("kernels/rt/emu.cpp")
        .try_compile("brightrun_emu")?;
    println!("cargo:rustc-cfg=kernels_emu");
    Ok(())
}

/// Names of the kernels in a preprocessed source.
fn kernel_names(text: &str) -> Vec<String> {
    let after = text.split("extern \"C\" int ").skip(1);
    let names = after.filter_map(|rest| rest.split_once("_emu(").map(|(name, _)| name));
    let is_name = |name: &&str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    names.filter(is_name).map(ToOwned::to_owned).collect()
}

/// One fatbin per file, and `fatbins.rs`, which embeds them; what ptxas says goes to `ptxas.txt`.
fn compile_cuda(kernels: &[PathBuf], out: &Path) -> Result<()> {
    let Some(nvcc) = find_nvcc() else {
        if env::var("BRIGHTRUN_KERNELS").as_deref() == Ok("require") {
            return Err("BRIGHTRUN_KERNELS=require, but there is no nvcc; run scripts/get-nvcc.sh, or set NVCC".into());
        }
        println!(
            "cargo:warning=no nvcc: built without CUDA kernels (scripts/get-nvcc.sh fetches it)"
        );
        return Ok(());
    };
    let archs = env::var("BRIGHTRUN_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    let (mut table, mut report) = (String::new(), String::new());
    for path in kernels {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let fatbin = out.join(format!("{name}.fatbin"));
        let mut command = Command::new(&nvcc);
        command.args([
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-Werror",
            "all-warnings",
            "-Xptxas",
            "-v,-warn-spills",
            "-fatbin",
        ]);
        for arch in archs.split(',').map(str::trim) {
            command
                .arg("-gencode")
                .arg(format!("arch=compute_{arch},code=sm_{arch}"));
        }
        let result = command.arg(path).arg("-o").arg(&fatbin).output()?;
        let said = String::from_utf8_lossy(&result.stderr);
        if !result.status.success() {
            return Err(format!("{} {}:\n{said}", nvcc.display(), path.display()).into());
        }
        report.push_str(&said);
        writeln!(
            table,
            "    ({name:?}, include_bytes!({:?})),",
            fatbin.display().to_string()
        )?;
    }
    fs::write(out.join("ptxas.txt"), report)?;
    fs::write(
        out.join("fatbins.rs"),
        format!(
            "/// Every compiled kernel file.\npub const FATBINS: &[(&str, &[u8])] = &[\n{table}];\n"
        ),
    )?;
    println!("cargo:rustc-cfg=kernels_cuda");
    Ok(())
}

fn find_nvcc() -> Option<PathBuf> {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let in_path = env::var_os("PATH");
    let in_path = in_path
        .iter()
        .flat_map(env::split_paths)
        .map(|dir| dir.join("nvcc"));
    let fetched = PathBuf::from(".cuda/nvidia/cu13/bin/nvcc");
    let mut candidates = named
        .into_iter()
        .chain(home)
        .chain(in_path)
        .chain([fetched]);
    candidates.find(|path| path.is_file())
}

#[cfg(feature = "regen-bindings")]
mod bindings {
    use super::{Result, files};

    const HEADER: &str = "//! Params of the kernels, made from `kernels/*.h` by `scripts/bindings.sh`. Not to be edited.\n\
        #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, \
        clippy::allow_attributes, clippy::allow_attributes_without_reason, reason = \"generated\")]\n";

    /// Params structs hold no padding and no references: any bytes are one.
    #[derive(Debug)]
    struct Derives;

    impl bindgen::callbacks::ParseCallbacks for Derives {
        fn add_derives(&self, _: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
            vec!["bytemuck::Pod".to_owned(), "bytemuck::Zeroable".to_owned()]
        }
    }

    pub(super) fn write() -> Result<()> {
        let mut builder = bindgen::Builder::default()
            .clang_args(["-xc++", "-std=c++17", "-DBRIGHTRUN_BINDGEN", "-Ikernels"])
            .allowlist_file(".*kernels/.*")
            .derive_default(true)
            .parse_callbacks(Box::new(Derives))
            .raw_line(HEADER)
            .formatter(bindgen::Formatter::Rustfmt);
        for path in files("kernels", "h")? {
            builder = builder.header(path.display().to_string());
        }
        builder
            .generate()?
            .write_to_file("src/backend/gpu/params.rs")?;
        Ok(())
    }
}
