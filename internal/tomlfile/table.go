package tomlfile

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Table is one table of a file. Its methods each ask for one key, and set *dst and return true if it is there and right.
// What is there and wrong is collected for Err. A table is used by one goroutine.
type Table struct {
	doc    *document
	path   string // "[vm]", "[[service]]"; empty at the top
	line   int
	values map[string]any
	lines  *node
	known  []string // the keys that were asked for
}

// Line returns the line on which the table begins.
func (t *Table) Line() int { return t.line }

// KeyLine returns the line of a key, or of the table if the key is not there.
func (t *Table) KeyLine(key string) int {
	if t.lines != nil && t.lines.children[key] != nil {
		return t.lines.children[key].line
	}
	return t.line
}

// Errorf collects an error at a key's line.
func (t *Table) Errorf(key, format string, args ...any) {
	t.doc.errorf(t.KeyLine(key), "%s: %s", t.display(key), fmt.Sprintf(format, args...))
}

// display returns how messages name a key: "boot_window in [vm]".
func (t *Table) display(key string) string {
	switch {
	case key == "":
		return t.path
	case t.path == "":
		return shown(key)
	}
	return shown(key) + " in " + t.path
}

// get returns the value of a key, nil if there is none, and marks the key as known.
func (t *Table) get(key string) any {
	if !slices.Contains(t.known, key) {
		t.known = append(t.known, key)
	}
	return t.values[key]
}

// Has reports whether a key is there. It does not count as asking for it.
func (t *Table) Has(key string) bool { return t.values[key] != nil }

// value returns the value of a key if it is there and a T. What names that type for messages: "a string".
func value[T any](t *Table, key, what string) (v T, ok bool) {
	raw := t.get(key)
	if raw == nil {
		return v, false
	}
	if v, ok = raw.(T); !ok {
		t.Errorf(key, "expected %s, got %s", what, typeName(raw))
	}
	return v, ok
}

// String asks for a string.
func (t *Table) String(key string, dst *string) bool {
	s, ok := value[string](t, key, "a string")
	if ok {
		*dst = s
	}
	return ok
}

// Is reports whether a key is there and is this string. Anything else is no error.
func (t *Table) Is(key, word string) bool { return t.get(key) == word }

// Bool asks for true or false.
func (t *Table) Bool(key string, dst *bool) bool {
	b, ok := value[bool](t, key, "true or false")
	if ok {
		*dst = b
	}
	return ok
}

// Int asks for a whole number from low to high.
func (t *Table) Int(key string, dst *int, low, high int) bool {
	what := fmt.Sprintf("a whole number from %d to %d", low, high)
	n, ok := value[int64](t, key, what)
	if ok && (n < int64(low) || n > int64(high)) {
		t.Errorf(key, "expected %s, got one outside", what)
		return false
	}
	if ok {
		*dst = int(n)
	}
	return ok
}

// parsed asks for a string that parse takes.
func parsed[T any](t *Table, key, what string, dst *T, parse func(string) (T, bool)) bool {
	s, ok := value[string](t, key, what)
	if !ok {
		return false
	}
	v, ok := parse(s)
	if !ok {
		t.Errorf(key, "expected %s, got %s", what, got(s))
		return false
	}
	*dst = v
	return true
}

// Choice asks for one of a few words.
func (t *Table) Choice(key string, dst *string, words ...string) bool {
	return parsed(t, key, "one of "+quoteAll(words), dst, func(s string) (string, bool) {
		return s, slices.Contains(words, s)
	})
}

// Duration asks for a time such as "10m", from low to high.
func (t *Table) Duration(key string, dst *time.Duration, low, high time.Duration) bool {
	what := fmt.Sprintf("a time from \"%s\" to \"%s\"", low, high)
	return parsed(t, key, what, dst, func(s string) (time.Duration, bool) {
		d, err := time.ParseDuration(s)
		return d, err == nil && d >= low && d <= high
	})
}

// Size asks for a number of octets such as "64MiB", from low to high octets.
func (t *Table) Size(key string, dst *int64, low, high int64) bool {
	what := fmt.Sprintf("a size from %q to %q", formatSize(low), formatSize(high))
	return parsed(t, key, what, dst, func(s string) (int64, bool) {
		n, ok := parseSize(s)
		return n, ok && n >= low && n <= high
	})
}

// list returns the elements of an array if each is a T that valid takes; never nil if so.
func list[T any](t *Table, key, what string, valid func(T) bool) (out []T, ok bool) {
	items, ok := value[[]any](t, key, "a list of "+what+" in [ ]")
	out = []T{}
	for i, item := range items {
		v, isT := item.(T)
		if !isT || !valid(v) {
			t.Errorf(key, "expected a list of %s, got %s at place %d", what, typeName(item), i+1)
			return nil, false
		}
		out = append(out, v)
	}
	return out, ok
}

// Strings asks for a list of strings. An empty list is not nil.
func (t *Table) Strings(key string, dst *[]string) bool {
	out, ok := list(t, key, "strings", func(string) bool { return true })
	if ok {
		*dst = out
	}
	return ok
}

// Uint32s asks for a list of whole numbers from 0 to 4294967294. An empty list is not nil. The highest 32-bit number is
// refused: as a user id it means "none".
func (t *Table) Uint32s(key string, dst *[]uint32) bool {
	const what = "whole numbers from 0 to 4294967294"
	numbers, ok := list(t, key, what, func(n int64) bool { return n >= 0 && n < math.MaxUint32 })
	if !ok {
		return false
	}
	out := []uint32{}
	for _, n := range numbers {
		out = append(out, uint32(n))
	}
	*dst = out
	return true
}

var sizeForm = regexp.MustCompile(`^([0-9]{1,12})(KiB|MiB|GiB)$`)

var sizeShift = map[string]uint{"KiB": 10, "MiB": 20, "GiB": 30}

func parseSize(s string) (int64, bool) {
	m := sizeForm.FindStringSubmatch(s)
	if m == nil {
		return 0, false
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	shift := sizeShift[m[2]]
	return n << shift, err == nil && n <= math.MaxInt64>>shift
}

func formatSize(n int64) string {
	for _, unit := range []string{"GiB", "MiB"} {
		if n>>sizeShift[unit] > 0 {
			return fmt.Sprintf("%d%s", n>>sizeShift[unit], unit)
		}
	}
	return fmt.Sprintf("%dKiB", n>>10)
}

// Table asks for a table, [key] or key = { }. It returns nil if there is none.
func (t *Table) Table(key string) *Table {
	v := t.get(key)
	if v == nil {
		return nil
	}
	values, ok := v.(map[string]any)
	if !ok {
		t.Errorf(key, "expected a table %s, got %s", t.child(key, "[%s]"), typeName(v))
		return nil
	}
	return t.doc.open(t.child(key, "[%s]"), values, t.node(key, -1), t.KeyLine(key))
}

// Tables asks for an array of tables, [[key]] or key = [{ }, { }], in the order of the file.
func (t *Table) Tables(key string) []*Table {
	v := t.get(key)
	if v == nil {
		return nil
	}
	items, ok := asTables(v)
	if !ok {
		t.Errorf(key, "expected tables %s, got %s", t.child(key, "[[%s]]"), typeName(v))
		return nil
	}
	var out []*Table
	for i, item := range items {
		out = append(out, t.doc.open(t.child(key, "[[%s]]"), item, t.node(key, i), t.KeyLine(key)))
	}
	return out
}

func asTables(v any) ([]map[string]any, bool) {
	if tables, ok := v.([]map[string]any); ok {
		return tables, true
	}
	items, ok := v.([]any)
	var tables []map[string]any
	for _, item := range items {
		table, isTable := item.(map[string]any)
		ok = ok && isTable
		tables = append(tables, table)
	}
	return tables, ok
}

// node returns where a sub-table, or element i of an array of tables, was found in the text; nil if it is inline.
func (t *Table) node(key string, i int) *node {
	if t.lines == nil || t.lines.children[key] == nil {
		return nil
	}
	n := t.lines.children[key]
	if i < 0 {
		return n
	}
	if i < len(n.elems) {
		return n.elems[i]
	}
	return nil
}

// child returns a sub-table's display name: "vm.key" in the form given.
func (t *Table) child(key, form string) string {
	if parent := strings.Trim(t.path, "[]"); parent != "" {
		key = parent + "." + key
	}
	return fmt.Sprintf(form, key)
}

// reportUnknown collects an error for each key that nobody asked for.
func (t *Table) reportUnknown() {
	for key := range t.values {
		if slices.Contains(t.known, key) {
			continue
		}
		text := "unknown key " + shown(key)
		if t.path != "" {
			text += " in " + t.path
		}
		if near := nearest(key, t.known); near != "" {
			text += fmt.Sprintf("; did you mean %q", near)
		}
		t.doc.errorf(t.KeyLine(key), "%s; known here: %s", text, strings.Join(t.known, ", "))
	}
}
