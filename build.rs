//! Compiles `kernels/*.cu`: with the host's C++ compiler for the emulated device, with nvcc (where there is one) for CUDA.
//!
//! nvcc is looked for as `NVCC`, in `CUDA_HOME`, in `PATH`, and below `.cuda/` (`scripts/get-nvcc.sh`).
//! `BRIGHTRUN_KERNELS=require` makes its absence an error. `BRIGHTRUN_CUDA_ARCHS` names the architectures.
//! `BRIGHTRUN_EMU_SANITIZE=1` builds the emulated device with sanitizers.

#![expect(
    clippy::disallowed_methods,
    reason = "a build script is told by its environment"
)]

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What ptxas is told: resources are reported, a spill is a warning.
const WARN_SPILLS: &str = "-v,-warn-spills";

/// Architectures on which no kernel may spill.
const TUNED_ARCHS: [&str; 2] = ["80", "90a"];

/// How nvcc is called.
const NVCC_FLAGS: [&str; 11] = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    WARN_SPILLS,
    "-Ikernels",
    "-fatbin",
    // A fifth of the size, unpacked by the driver when it is loaded.
    "-Xfatbin",
    "-compress-all",
];

/// Where kernels' headers are, and how they end.
const HEADERS: [(&str, &str); 4] = [
    ("kernels", "h"),
    ("kernels", "cuh"),
    ("kernels/rt", "h"),
    ("kernels/rt", "cuh"),
];

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
    let is_sanitized = env::var_os("BRIGHTRUN_EMU_SANITIZE").is_some();
    if is_sanitized {
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
    let compiler = build.try_get_compiler()?;
    let archive = compiler
        .to_command()
        .arg("-print-file-name=libstdc++.a")
        .output()?;
    let archive = PathBuf::from(String::from_utf8_lossy(&archive.stdout).trim());
    // Linked in, so that the binary runs where no C++ library is. Without an archive: as usual.
    if let (true, Some(dir)) = (archive.is_absolute(), archive.parent()) {
        build.cpp_link_stdlib(None);
        println!("cargo:rustc-link-search=native={}", dir.display());
    }
    let key = format!("{} {:?}", compiler.path().display(), compiler.args());
    let names = for_each(kernels, |path| {
        cached(path, "emu.o", &key, |object| {
            let mut one = build.clone();
            one.flag("-xc++").file(path).out_dir(out.join(stem(path)));
            let text = one.try_expand()?;
            let objects = one.try_compile_intermediates()?;
            fs::copy(&objects[0], object)?;
            Ok(kernel_names(&String::from_utf8_lossy(&text)).join("\n"))
        })
    })?;
    let (mut table, mut declarations) = (String::new(), String::new());
    for (object, names) in &names {
        build.object(object);
        for name in names.lines() {
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
        .file("kernels/rt/emu.cpp")
        .try_compile("brightrun_emu")?;
    if archive.is_absolute() {
        // After the kernels, which use it.
        println!("cargo:rustc-link-lib=static:-bundle=stdc++");
    }
    println!("cargo:rustc-cfg=kernels_emu");
    Ok(())
}

fn stem(path: &Path) -> &str {
    path.file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default()
}

/// A file made of a kernel file, and what `make` says of it; made only where the kernel file, a header or `key` is new. It
/// lies beside the builds of all profiles, which share it.
fn cached(
    source: &Path,
    extension: &str,
    key: &str,
    make: impl FnOnce(&Path) -> Result<String>,
) -> Result<(PathBuf, String)> {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    fs::read(source)?.hash(&mut hasher);
    for (dir, extension) in HEADERS {
        for header in files(dir, extension)? {
            fs::read(header)?.hash(&mut hasher);
        }
    }
    // OUT_DIR is target/PROFILE/build/PACKAGE/out.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let dir = out.ancestors().nth(4).unwrap_or(&out).join("kernels");
    fs::create_dir_all(&dir)?;
    let name = format!("{}-{:016x}", stem(source), hasher.finish());
    let product = dir.join(&name).with_extension(extension);
    let said_path = dir.join(&name).with_extension(format!("{extension}.said"));
    if product.is_file()
        && let Ok(said) = fs::read_to_string(&said_path)
    {
        return Ok((product, said));
    }
    let partial = dir.join(format!("{name}.{}.partial", std::process::id()));
    let said = make(&partial)?;
    fs::rename(&partial, &product)?;
    // Last: it says that the product is whole.
    fs::write(said_path, &said)?;
    Ok((product, said))
}

/// `f` of every file, on as many threads as cargo allows, in the order of the files.
fn for_each<T: Send>(paths: &[PathBuf], f: impl Fn(&Path) -> Result<T> + Sync) -> Result<Vec<T>> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(path) = paths.get(index) else {
                return done;
            };
            // Errors cross threads as text.
            done.push((index, f(path).map_err(|error| error.to_string())));
        }
    };
    let mut all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.unwrap_or(1)).map(|_| scope.spawn(work)).collect();
        let done = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        done.collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter()
        .map(|(_, result)| result.map_err(Into::into))
        .collect()
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
    let toolkit = toolkit_version(&nvcc)?;
    let key = format!("{} {toolkit:?} {archs} {NVCC_FLAGS:?}", nvcc.display());
    let fatbins = for_each(kernels, |path| {
        cached(path, "fatbin", &key, |fatbin| {
            compile_fatbin(&nvcc, &archs, path, fatbin)
        })
    })?;
    let (mut table, mut report) = (String::new(), String::new());
    for (path, (fatbin, said)) in kernels.iter().zip(&fatbins) {
        report.push_str(said);
        writeln!(
            table,
            "        ({:?}, &Aligned(*include_bytes!({:?})).0, &{:?}),",
            stem(path),
            fatbin.display().to_string(),
            compiled_kernels(said)
        )?;
    }
    fs::write(out.join("ptxas.txt"), report)?;
    fs::write(
        out.join("fatbins.rs"),
        format!(
            "/// Every compiled kernel file.\nconst FATBINS: Fatbins = Fatbins {{\n    archs: {archs:?},\n    toolkit: {toolkit:?},\n    files: &[\n{table}    ],\n}};\n"
        ),
    )?;
    println!("cargo:rustc-cfg=kernels_cuda");
    Ok(())
}

/// The kernels that ptxas tells of.
fn compiled_kernels(said: &str) -> Vec<&str> {
    let after = said.split("Compiling entry function '").skip(1);
    let names = after.filter_map(|rest| rest.split_once('\'').map(|(name, _)| name));
    // Once for every architecture.
    let unique: BTreeSet<&str> = names.collect();
    unique.into_iter().collect()
}

/// Major and minor version of CUDA that nvcc is of.
fn toolkit_version(nvcc: &Path) -> Result<(u32, u32)> {
    let said = Command::new(nvcc).arg("--version").output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.split("release ").nth(1).and_then(|rest| {
        let (major, rest) = rest.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    version.ok_or_else(|| format!("{} --version tells no release: {said}", nvcc.display()).into())
}

/// Compiles one file for all of `archs`; what ptxas says of it.
fn compile_fatbin(nvcc: &Path, archs: &str, path: &Path, fatbin: &Path) -> Result<String> {
    let mut command = Command::new(nvcc);
    // Registers are shared out for the architectures that are tuned; on others a few bytes may spill.
    let is_tuned = archs
        .split(',')
        .all(|arch| TUNED_ARCHS.contains(&arch.trim()));
    command.args(NVCC_FLAGS.map(|flag| match flag {
        WARN_SPILLS if !is_tuned => "-v",
        flag => flag,
    }));
    for arch in archs.split(',').map(str::trim) {
        command
            .arg("-gencode")
            .arg(format!("arch=compute_{arch},code=sm_{arch}"));
    }
    let result = command.arg(path).arg("-o").arg(fatbin).output()?;
    let said = String::from_utf8_lossy(&result.stderr).into_owned();
    if !result.status.success() {
        return Err(format!("{} {}:\n{said}", nvcc.display(), path.display()).into());
    }
    Ok(said)
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
