#!/usr/bin/env python3
"""The test of `words`: each rule finds the texts that it is for, and no similar ones."""

import unittest
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

LOADER = SourceFileLoader("words", str(Path(__file__).with_name("words")))
words = module_from_spec(spec_from_loader("words", LOADER))
LOADER.exec_module(words)


class Words(unittest.TestCase):
    def lines(self, find, text):
        """Returns the lines of a text that have a problem."""
        return sorted(line for line, _ in words.problems(text, find(text)))

    def test_rust_comments_that_begin_badly(self):
        for comment in ("/// What a guest is given.", "//! Its pods.", "// Of two, the later one.", "/* Why: nobody knows. */"):
            self.assertEqual(self.lines(words.rust, f"fn f() {{}}\n{comment}\n"), [2], comment)
        self.assertEqual(self.lines(words.rust, "let a = 1; // It is first.\n"), [1])

    def test_rust_comments_that_are_fine(self):
        for text in (
            "/// The pods of a node, and\n/// what they use.\n",
            "/// The pods.\n///\n/// They end.\n",
            "let a = 1; // the first, and\n           // that is all\n",
            "// Who closes it? The reader.\n",
            "// Whatever comes.\n/// What-if questions.\n",
            'let a = "// What";\nlet b = r#"\n// What "it" is\n"#;\nlet c = \'"\'; // a quote\nlet d = "//\\" // Its";\n',
            "fn f<'a>(a: &'a str) -> &'a str { a } // the same 'a\n",
        ):
            self.assertEqual(self.lines(words.rust, text), [], text)

    def test_sections_that_begin_badly(self):
        for line in ("What systemd says.", "With the step.", "In words."):
            self.assertEqual(self.lines(words.rust, f"/// Makes a unit.\n///\n/// # Errors\n/// {line}\n"), [1], line)
        self.assertEqual(self.lines(words.rust, "/// Makes a unit.\n///\n/// # Errors\n/// systemd refuses it.\n/// In time.\n"), [])

    def test_doc_comments_of_one_word(self):
        self.assertEqual(self.lines(words.rust, "/// Bytes.\na: u64,\n/// Two words.\nb: u64,\n// One.\n//// Rule\n"), [1])
        self.assertEqual(self.lines(words.python, '"""Pods."""\n\n\ndef f():\n    """The pods."""\n'), [1])

    def test_python_and_shell(self):
        self.assertEqual(self.lines(words.python, 'A = "# What"  # What it is\n\n\ndef f():\n    """Its end."""\n'), [1, 5])
        self.assertEqual(self.lines(words.shell, "#!/bin/bash\n# What it is,\n# that is.\necho '# What' # fine\n"), [2])
        self.assertEqual(self.lines(words.shell, "a=${b#What}\necho # Its end\n"), [2])

    def test_names_that_were_replaced(self):
        self.assertEqual(self.lines(words.rust, "fn take_apart_later() {}\nfn owed() {}\nstruct Owed;\n"), [1, 3])
        self.assertEqual(self.lines(words.rust, "const PATIENCE: u8 = 1;\nconst READ_PATIENCE: u8 = 1;\n"), [1])


if __name__ == "__main__":
    unittest.main()
