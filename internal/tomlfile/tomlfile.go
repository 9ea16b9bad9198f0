// Package tomlfile is a TOML file of settings whose every entry knows its line, so that whatever is wrong in it can be said
// with file and line.
//
// It is strict: a key that nobody asked for, a key in the wrong letter case and a value of the wrong type are errors. Errors
// are collected, so that one reading shows all of them, and never repeat a value of the file, which may be a secret that
// somebody put in the wrong place.
package tomlfile

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// maxErrors bounds how many errors one file reports.
const maxErrors = 20

// An Error is one thing that is wrong in a file.
type Error struct {
	File string // the file's name as given to Parse
	Line int    // 1 is the first line
	Text string // what was expected and what came
}

// Error returns "file:line: text".
func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Text) }

// document is what all tables of one file share.
type document struct {
	name   string
	tables []*Table
	errs   []*Error
}

func (d *document) errorf(line int, format string, args ...any) {
	d.errs = append(d.errs, &Error{File: d.name, Line: line, Text: fmt.Sprintf(format, args...)})
}

// Parse reads the text of a file. Name is used in messages only. What is not TOML is an *Error; what is wrong in the
// values is collected while they are asked for, and returned by the root table's Err.
func Parse(name string, data []byte) (root *Table, err error) {
	defer func() {
		if r := recover(); r != nil { // the decoder panics on its own mistakes
			root, err = nil, &Error{File: name, Line: 1, Text: "not understood by the TOML decoder; write it more simply"}
		}
	}()
	if line, wrong := checkShape(string(data)); wrong != "" {
		return nil, &Error{File: name, Line: line, Text: wrong}
	}
	var values map[string]any
	if _, err := toml.Decode(string(data), &values); err != nil {
		return nil, syntaxError(name, err)
	}
	doc := &document{name: name}
	return doc.open("", values, index(string(data)), 1), nil
}

// quoted is what the decoder repeats of a file in its messages.
var quoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|'[^']*'|["'].*$|-?[0-9][0-9a-fA-Fx_.]{3,}`)

// redact leaves of what was quoted only single characters, in their quotes.
func redact(s string) string {
	if len(s) <= 3 {
		return s
	}
	return "..."
}

func syntaxError(name string, err error) error {
	var perr toml.ParseError
	if !errors.As(err, &perr) {
		return &Error{File: name, Line: 1, Text: "expected TOML"}
	}
	text := strings.ReplaceAll(perr.Message, "\n", " ")
	return &Error{File: name, Line: max(1, perr.Position.Line), Text: "expected TOML: " + quoted.ReplaceAllStringFunc(text, redact)}
}

// open makes the table of values and registers it, so that Err sees what nobody asked it for.
func (d *document) open(path string, values map[string]any, lines *node, line int) *Table {
	if lines != nil && lines.line > 0 {
		line = lines.line
	}
	t := &Table{doc: d, path: path, line: line, values: values, lines: lines}
	d.tables = append(d.tables, t)
	return t
}

// Err returns all that was wrong in the file so far, joined, in the order of lines; unknown keys included, so it is called
// when everything has been asked for. It concerns the whole file, whichever of its tables it is called on.
func (t *Table) Err() error {
	d := t.doc
	for _, t := range d.tables {
		t.reportUnknown()
	}
	d.tables = nil
	if len(d.errs) == 0 {
		return nil
	}
	slices.SortStableFunc(d.errs, func(a, b *Error) int { return cmp.Compare(a.Line, b.Line) })
	var all []error
	for _, e := range d.errs[:min(len(d.errs), maxErrors)] {
		all = append(all, e)
	}
	if more := len(d.errs) - maxErrors; more > 0 {
		all = append(all, fmt.Errorf("%s: and %d more errors", d.name, more))
	}
	return errors.Join(all...)
}
