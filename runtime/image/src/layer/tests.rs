#![allow(clippy::indexing_slicing)]

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

use super::*;
use husk_base::id::hex;

/// A tar archive, whose paths may be anything.
struct Archive(Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, path: &str, link: &str, body: &[u8]) -> Self {
        let mut header = Header::new_ustar();
        // The library refuses to write such a path, so it is copied here.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o4755);
        header.set_uid(1001);
        header.set_gid(1002);
        header.set_mtime(1_600_000_000);
        header.set_size(body.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, body).unwrap();
        self
    }

    fn file(self, path: &str, body: &str) -> Self {
        self.entry(EntryType::Regular, path, "", body.as_bytes())
    }

    fn folder(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, "", b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

struct Image {
    folder: tempfile::TempDir,
    unpacker: Unpacker,
}

impl Image {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("files")).unwrap();
        let unpacker = Unpacker::new(&folder.path().join("files"), &limits).unwrap();
        Self { folder, unpacker }
    }

    fn apply_bytes(&mut self, bytes: &[u8], packing: Packing) -> Result<(), String> {
        let plain = match packing {
            Packing::Plain => bytes.to_vec(),
            Packing::Gzip => {
                let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                out.write_all(bytes).unwrap();
                out.finish().unwrap()
            }
            // A skippable frame comes first, as some tools write.
            Packing::Zstd => {
                [&b"\x50\x2a\x4d\x18\x02\0\0\0xx"[..], &zstd::encode_all(bytes, 1).unwrap()].concat()
            }
        };
        let blob = self.folder.path().join("blob");
        std::fs::write(&blob, plain).unwrap();
        let diff_id = format!("sha256:{}", hex(&Sha256::digest(bytes)));
        self.unpacker.apply(&blob, &diff_id).map_err(|failure| match failure {
            Failure::Refused(why) => why,
            Failure::Disk(stage, path, error) => panic!("{stage} {}: {error}", path.display()),
        })
    }

    fn apply(&mut self, archive: Archive) -> Result<(), String> {
        self.apply_bytes(&archive.bytes(), Packing::Plain)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("files").join(path)
    }

    fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap()
    }
}

#[test]
fn files_come_with_owner_mode_and_time_in_every_packing() {
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let mut image = Image::new();
        let archive = Archive::new()
            .folder("bin/")
            .file("./bin/tool", "run")
            .entry(EntryType::Symlink, "bin/alias", "/bin/tool", b"")
            .entry(EntryType::Link, "bin/twin", "bin/tool", b"")
            .entry(EntryType::Char, "null", "", b"")
            .entry(EntryType::Fifo, "pipe", "", b"");
        image.apply_bytes(&archive.bytes(), packing).unwrap();
        let tool = std::fs::metadata(image.path("bin/tool")).unwrap();
        assert_eq!((tool.uid(), tool.gid(), tool.mtime()), (1001, 1002, 1_600_000_000));
        assert_eq!(tool.permissions().mode() & 0o7777, 0o4755);
        assert_eq!(tool.ino(), std::fs::metadata(image.path("bin/twin")).unwrap().ino());
        assert_eq!(std::fs::read_link(image.path("bin/alias")).unwrap(), Path::new("/bin/tool"));
        assert!(std::fs::metadata(image.path("null")).unwrap().file_type().is_char_device());
        assert!(std::fs::metadata(image.path("pipe")).unwrap().file_type().is_fifo());
        assert_eq!(std::fs::metadata(image.path("bin")).unwrap().mtime(), 1_600_000_000);
    }
}

#[test]
fn whiteouts_hide_lower_layers_alone() {
    let mut image = Image::new();
    image
        .apply(Archive::new().file("a/one", "1").file("a/two", "2").file("b/x", "x").file("b/deep/y", "y"))
        .unwrap();
    image
        .apply(
            Archive::new()
                .file("b/new", "new")
                .file("a/.wh.one", "")
                .file("b/.wh..wh..opq", "")
                .file("c", "c")
                .file(".wh.c", "")
                .file(".wh.absent", ""),
        )
        .unwrap();
    assert!(!image.path("a/one").exists());
    assert_eq!(image.text("a/two"), "2");
    assert!(!image.path("b/x").exists() && !image.path("b/deep").exists());
    assert_eq!(image.text("b/new"), "new");
    assert_eq!(image.text("c"), "c");
}

#[test]
fn a_whiteout_of_a_folder_that_comes_anew_hides_what_was_in_it() {
    for whiteout_first in [true, false] {
        let mut image = Image::new();
        image.apply(Archive::new().folder("a/").file("a/old", "1").file("a/b/old", "2")).unwrap();
        let whiteout = |archive: Archive| archive.file(".wh.a", "");
        let folder = |archive: Archive| archive.folder("a/").file("a/b/new", "3");
        let layer = match whiteout_first {
            true => folder(whiteout(Archive::new())),
            false => whiteout(folder(Archive::new())),
        };
        image.apply(layer).unwrap();
        assert!(!image.path("a/old").exists() && !image.path("a/b/old").exists());
        assert_eq!(image.text("a/b/new"), "3");
    }
}

#[test]
fn a_whiteout_through_a_link_stays_inside() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "precious").unwrap();
    let mut image = Image::new();
    let target = outside.path().to_str().unwrap();
    image.apply(Archive::new().entry(EntryType::Symlink, "way", target, b"")).unwrap();
    image.apply(Archive::new().file("way/.wh.file", "").file("way/.wh..wh..opq", "")).unwrap();
    assert!(outside.path().join("file").exists());
    image.apply(Archive::new().file(".wh.way", "")).unwrap();
    assert!(outside.path().join("file").exists());
    assert!(std::fs::symlink_metadata(image.path("way")).is_err());
}

#[test]
fn attributes_of_files_come_along() {
    let capability = [1, 0, 0, 2, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let record = |key: &str, value: &[u8]| {
        let length = key.len() + value.len() + 3;
        let length = length + (length + 2).to_string().len();
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    };
    let records = [
        record("SCHILY.xattr.security.capability", &capability),
        record("mtime", b"1500000000.5"),
        record("uid", b"70000"),
    ]
    .concat();
    let mut image = Image::new();
    let archive =
        Archive::new().entry(EntryType::XHeader, "x", "", &records).file("bin/ping", "binary with powers");
    image.apply(archive).unwrap();
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(image.path("bin/ping"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(value[..length], capability);
    let metadata = std::fs::metadata(image.path("bin/ping")).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.mtime(), metadata.mtime_nsec()),
        (70000, 1_500_000_000, 500_000_000)
    );
    assert_eq!(metadata.mode() & 0o7777, 0o4755, "the attribute does not take setuid away");
}

#[test]
fn the_root_has_attributes_too() {
    let mut image = Image::new();
    image.apply(Archive::new().folder("./").file("f", "")).unwrap();
    let root = std::fs::metadata(image.path("")).unwrap();
    assert_eq!((root.uid(), root.mode() & 0o7777, root.mtime()), (1001, 0o4755, 1_600_000_000));
}

#[test]
fn a_later_layer_replaces_kinds() {
    let mut image = Image::new();
    image.apply(Archive::new().file("was-folder/x", "x").file("was-file", "f")).unwrap();
    image
        .apply(Archive::new().file("was-folder", "now a file").folder("was-file/").file("was-file/y", "y"))
        .unwrap();
    assert_eq!(image.text("was-folder"), "now a file");
    assert_eq!(image.text("was-file/y"), "y");
}

#[test]
fn what_leaves_the_image_is_refused() {
    for (archive, word) in [
        (Archive::new().file("/../x", "x"), "`..`"),
        (Archive::new().file("../x", "x"), "`..`"),
        (Archive::new().file("a/../../x", "x"), "`..`"),
        (Archive::new().entry(EntryType::Link, "x", "../../../etc/passwd", b""), "leaves"),
        (Archive::new().entry(EntryType::Link, "x", "/../etc/passwd", b""), "leaves"),
        (Archive::new().entry(EntryType::Link, "x", "/etc/hostname", b""), "place in the image"),
        (Archive::new().file("/x", "").entry(EntryType::Link, "x", "/x", b""), "no file"),
        (Archive::new().entry(EntryType::Link, "x", "absent", b""), "no file"),
        (Archive::new().file("x", "").entry(EntryType::Link, "x", "x", b""), "no file"),
        (Archive::new().file("x/y", "").entry(EntryType::Link, "x", "x/y", b""), "no file"),
        (Archive::new().folder("x").entry(EntryType::Link, "y", "x", b""), "no file"),
        (Archive::new().entry(EntryType::Symlink, "./", "x", b""), "root"),
        (Archive::new().entry(EntryType::new(b'V'), "x", "", b""), "unsupported"),
        (Archive::new().file("f", "").file("f/x", ""), "f/x"),
        (Archive::new().file(".wh...", ""), "hides nothing"),
    ] {
        let error = Image::new().apply(archive).unwrap_err();
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn a_slash_in_front_means_the_images_root() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    std::fs::write(outside.path().join("file"), "precious").unwrap();
    let mut image = Image::new();
    image
        .apply(
            Archive::new()
                .folder("/")
                .folder("/ko-app/")
                .file("/ko-app/tool", "run")
                .file("//var/run/ko/data", "data")
                .entry(EntryType::Link, "/twin", "/ko-app/tool", b"")
                .entry(EntryType::Symlink, "/way", target, b"")
                .file(&format!("{target}/file"), "of the image"),
        )
        .unwrap();
    assert_eq!((image.text("ko-app/tool"), image.text("var/run/ko/data")), ("run".into(), "data".into()));
    let inode = |path: &str| std::fs::metadata(image.path(path)).unwrap().ino();
    assert_eq!(inode("twin"), inode("ko-app/tool"));
    let inside = target.trim_start_matches('/');
    assert_eq!(image.text(&format!("{inside}/file")), "of the image");
    image.apply(Archive::new().file("/way/file", "by way of a link").file("/.wh.twin", "")).unwrap();
    assert_eq!(image.text(&format!("{inside}/file")), "by way of a link");
    assert!(!image.path("twin").exists());
    assert_eq!(std::fs::read_to_string(outside.path().join("file")).unwrap(), "precious");
}

#[test]
fn links_do_not_lead_deeper_than_a_path_may() {
    let down = "a/".repeat(40);
    let depth = |image: &Image| {
        let mut path = image.path("a");
        std::iter::from_fn(|| path.is_dir().then(|| path.push("a"))).count()
    };
    let link = |archive: Archive, number: usize, target: &str| {
        archive.entry(EntryType::Symlink, &format!("s{number}"), target.trim_end_matches('/'), b"")
    };
    let mut image = Image::new();
    let archive = link(Archive::new().folder(&down), 1, &down).folder(&format!("s1/{down}"));
    image.apply(archive).unwrap();
    assert_eq!(depth(&image), 80, "an honest layer may use links");
    for last in ["", "f"] {
        let mut archive = link(Archive::new().folder(&down), 1, &down);
        for number in 1..12 {
            let deeper = format!("s{number}/{down}");
            let kind = if last.is_empty() { EntryType::Directory } else { EntryType::Regular };
            archive = archive.entry(kind, &format!("{deeper}{last}"), "", b"");
            archive = link(archive, number + 1, &deeper);
        }
        let mut image = Image::new();
        let error = image.apply(archive).unwrap_err();
        assert!(error.contains("deeper than 256"), "{error}");
        assert!((240..=256).contains(&depth(&image)), "{}", depth(&image));
    }
}

#[test]
fn a_link_in_a_lower_layer_leads_nowhere_outside() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let mut image = Image::new();
    image
        .apply(Archive::new().entry(EntryType::Symlink, "way", target, b"").entry(
            EntryType::Symlink,
            "up",
            "../../..",
            b"",
        ))
        .unwrap();
    // Inside the image the link names a folder that is not there.
    let _ = image.apply(Archive::new().file("way/planted", "x"));
    image.apply(Archive::new().file("up/planted", "x")).unwrap();
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(image.text("planted"), "x", "`..` ends at the image's root");
}

#[test]
fn a_folder_is_made_where_a_link_leads_that_leads_nowhere_yet() {
    let mut image = Image::new();
    let link = |archive: Archive, path, target| archive.entry(EntryType::Symlink, path, target, b"");
    let archive = link(Archive::new(), "opt/l", "/nowhere/dir").file("opt/l/file", "absolute");
    let archive = link(archive, "opt/r", "../beside/./dir").file("opt/r/file", "relative");
    let archive = link(archive, "opt/up", "../../../above").file("opt/up/file", "above");
    let archive = link(archive, "one", "two/x");
    let archive = link(archive, "two", "three").file("one/file", "through two");
    image.apply(archive).unwrap();
    for (path, text) in [
        ("nowhere/dir/file", "absolute"),
        ("beside/dir/file", "relative"),
        ("above/file", "above"),
        ("three/x/file", "through two"),
    ] {
        assert_eq!(image.text(path), text);
    }
    assert!(std::fs::symlink_metadata(image.path("opt/l")).unwrap().is_symlink());
    let circle = link(link(Archive::new(), "a", "b"), "b", "a").file("a/file", "");
    assert!(image.apply(circle).unwrap_err().contains("does not lead to a place"));
}

/// An archive of a file with holes, made by GNU tar.
fn sparse_archive(folder: &Path, options: &[&str]) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = File::create(folder.join("sparse")).unwrap();
    file.set_len(64 << 20).unwrap();
    for number in 0..40u64 {
        file.write_all_at(format!("part {number}").as_bytes(), number << 20).unwrap();
    }
    std::fs::write(folder.join("after"), "plain").unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.args(["--sparse", "--create", "--file=-", "--directory"]).arg(folder).args(options);
    let output = tar.args(["sparse", "after"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn a_sparse_file_of_any_format_has_its_holes() {
    let folder = tempfile::tempdir().unwrap();
    for options in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        let bytes = sparse_archive(folder.path(), options);
        assert!(bytes.len() < 8 << 20, "tar has stored the holes");
        let mut image = Image::new();
        image.apply_bytes(&bytes, Packing::Plain).unwrap();
        let made = std::fs::read(image.path("sparse")).unwrap();
        assert!(made == std::fs::read(folder.path().join("sparse")).unwrap(), "{options:?}");
        let metadata = std::fs::metadata(image.path("sparse")).unwrap();
        assert!(metadata.blocks() * 512 < 8 << 20, "{options:?}: {} blocks", metadata.blocks());
        assert_eq!(image.text("after"), "plain");
        let few = Limits { bytes: 32 << 20, ..Limits::default() };
        let error = Image::with(few).apply_bytes(&bytes, Packing::Plain).unwrap_err();
        assert!(error.contains("more than"), "holes count: {error}");
    }
}

#[test]
fn attributes_are_set_on_files_and_folders() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("dir")).unwrap();
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    std::fs::write(folder.path().join("tool"), "x").unwrap();
    rustix::fs::setxattr(
        folder.path().join("tool"),
        "security.capability",
        &capability,
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--create", "--file=-", "--directory"]).arg(folder.path());
    let output = tar.args(["tool", "dir"]).output().unwrap();
    let mut image = Image::new();
    image.apply_bytes(&output.stdout, Packing::Plain).unwrap();
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(image.path("tool"), "security.capability", &mut value).unwrap();
    assert_eq!(value[..length], capability);
}

#[test]
fn too_much_is_refused() {
    let limits = Limits { bytes: 100, entries: 3, devices: 1 };
    let many = (0..5).fold(Archive::new(), |archive, number| archive.file(&format!("f{number}"), ""));
    let devices = Archive::new().entry(EntryType::Char, "a", "", b"").entry(EntryType::Block, "b", "", b"");
    for (archive, word) in [
        (Archive::new().file("big", &"x".repeat(101)), "more than 100 bytes"),
        (many, "more than 3 files"),
        (Archive::new().file("a/b/c/d/e/f", "").file("g", ""), "more than 3 files"),
        (devices, "device nodes"),
    ] {
        let error = Image::with(limits.clone()).apply(archive).unwrap_err();
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn a_wrong_diff_id_and_a_truncated_archive_are_refused() {
    let mut image = Image::new();
    let bytes = Archive::new().file("x", "text").bytes();
    let blob = image.folder.path().join("blob");
    std::fs::write(&blob, &bytes).unwrap();
    let wrong = image.unpacker.apply(&blob, "sha256:00");
    assert!(matches!(wrong, Err(Failure::Refused(why)) if why.contains("digest")));
    std::fs::write(&blob, &bytes[..514]).unwrap();
    assert!(matches!(image.unpacker.apply(&blob, "sha256:00"), Err(Failure::Refused(_))));
    for text in [&b"no archive"[..], b"\x1f\x8bnot gzip", b"\x28\xb5\x2f\xfdnot zstd"] {
        std::fs::write(&blob, text).unwrap();
        assert!(matches!(image.unpacker.apply(&blob, "sha256:00"), Err(Failure::Refused(_))), "{text:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Any bytes at all give files in the folder, or a refusal.
    #[test]
    fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = Image::new().apply_bytes(&bytes, Packing::Plain);
    }

    /// Any sequence of entries stays inside the folder.
    #[test]
    fn any_entries_stay_inside(entries in proptest::collection::vec(
        (0usize..6, "[a-c/.]{1,8}", "[a-c/.]{1,8}"), 1..12)) {
        let mut image = Image::new();
        let archive = entries.iter().fold(Archive::new(), |archive, (kind, path, link)| {
            let kind = [EntryType::Regular, EntryType::Directory, EntryType::Symlink, EntryType::Link, EntryType::Fifo, EntryType::Char][*kind];
            archive.entry(kind, path, if matches!(kind, EntryType::Symlink | EntryType::Link) { link } else { "" }, b"")
        });
        let _ = image.apply(archive);
        let mut names: Vec<_> = std::fs::read_dir(image.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        prop_assert_eq!(names, ["blob", "files"]);
    }
}
