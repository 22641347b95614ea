//! Which kernel modules, and in what order.
//!
//! Debian's kernel package has no `modules.dep`: `depmod` makes that at installation. The modules
//! themselves say what they depend on, in the strings of their `.modinfo` section, so it is read
//! from there.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::fetch::Kernel;
use super::{GuestError, file_error, read};

/// A module to load.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// `wanted` and what they depend on, dependencies first; without what is built into the kernel.
pub(super) fn closure(kernel: &Kernel, wanted: &[&str]) -> Result<Vec<Module>, GuestError> {
    let dir = kernel.modules.join("kernel");
    let mut files = HashMap::new();
    index(&dir, &mut files)?;
    let list = kernel.modules.join("modules.builtin");
    let list = std::fs::read_to_string(&list).map_err(file_error("read", &list))?;
    let built_in: HashSet<String> = list.lines().map(|l| module_name(Path::new(l))).collect();
    let mut found = Closure {
        kernel,
        files,
        seen: built_in,
        modules: Vec::new(),
    };
    for name in wanted {
        found.add(&name.replace('-', "_"))?;
    }
    Ok(found.modules)
}

struct Closure<'a> {
    kernel: &'a Kernel,
    files: HashMap<String, PathBuf>,
    seen: HashSet<String>,
    modules: Vec<Module>,
}

impl Closure<'_> {
    fn add(&mut self, name: &str) -> Result<(), GuestError> {
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| GuestError::NoModule {
            release: self.kernel.release.clone(),
            module: name.to_owned(),
        })?;
        let content = read(path)?;
        for dependency in depends(&content) {
            self.add(&dependency)?;
        }
        self.modules.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

/// `kernel/fs/ext4/ext4.ko` is `ext4`; `-` and `_` are the same in module names.
fn module_name(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .replace('-', "_")
}

fn index(dir: &Path, files: &mut HashMap<String, PathBuf>) -> Result<(), GuestError> {
    for entry in std::fs::read_dir(dir).map_err(file_error("list", dir))? {
        let path = entry.map_err(file_error("list", dir))?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "ko") {
            files.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// What a module depends on: the value of `depends=` among its zero-terminated strings.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|&b| b == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(modules: &[(&str, &str)], built_in: &str) -> (tempfile::TempDir, Kernel) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
        for (name, depends) in modules {
            let content = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            std::fs::write(
                dir.path().join(format!("kernel/drivers/{name}.ko")),
                content,
            )
            .unwrap();
        }
        std::fs::write(dir.path().join("modules.builtin"), built_in).unwrap();
        let kernel = Kernel {
            image: PathBuf::new(),
            release: "6.1.0-test".to_owned(),
            modules: dir.path().to_owned(),
        };
        (dir, kernel)
    }

    fn names(kernel: &Kernel, wanted: &[&str]) -> Vec<String> {
        closure(kernel, wanted)
            .unwrap()
            .into_iter()
            .map(|m| m.name)
            .collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_dir, kernel) = kernel(
            &[
                ("virtio", ""),
                ("virtio_ring", "virtio"),
                ("virtio_pci", "virtio_ring,virtio-dev,virtio"),
                ("virtio-dev", ""),
                ("virtio_blk", "virtio,virtio_ring"),
            ],
            "kernel/fs/ext4/ext4.ko\n",
        );
        let expected = [
            "virtio",
            "virtio_ring",
            "virtio_dev",
            "virtio_pci",
            "virtio_blk",
        ];
        assert_eq!(
            names(&kernel, &["virtio_pci", "virtio_blk", "ext4"]),
            expected
        );
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let (_dir, kernel) = kernel(&[("a", "b")], "");
        let error = closure(&kernel, &["a"]).unwrap_err().to_string();
        assert_eq!(error, "the kernel 6.1.0-test has no module b");
    }
}
