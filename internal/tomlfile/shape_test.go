package tomlfile

import (
	"errors"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
)

// dotted is a key of so many parts, each "a".
func dotted(parts int) string { return strings.Repeat("a.", parts-1) + "a" }

// nested is a value with so many lists and tables within one another; an even number.
func nested(n int) string {
	return "a = " + strings.Repeat("[{a=", n/2) + "1" + strings.Repeat("}]", n/2)
}

// What would take the decoder a gigabyte is refused before it sees it, with its line; the largest that is taken is.
func TestShape(t *testing.T) {
	long := strings.Repeat("a", maxKey)
	for _, c := range []struct{ good, bad string }{
		{dotted(16) + " = 1", dotted(17) + " = 1"},
		{dotted(2) + " = 1", dotted(2000) + " = 1"},
		{"[" + dotted(16) + "]", "[" + dotted(17) + "]"},
		{"[[" + dotted(16) + "]]", "[[" + dotted(17) + "]]"},
		{"a = { " + dotted(16) + " = 1 }", "a = { b = 1, " + dotted(17) + " = 1 }"},
		{"a = [1.5, [ { " + dotted(16) + " = 1.5 }]]", "a = [\n[ # comment\n{ " + dotted(17) + " = 1 }]]"},
		{long[1:] + "=1", long + "a=1"},
		{"['" + long[4:] + "']", "['" + long + "']"},
		{"a = ['" + long + "',\n '" + long + "']", "b = '''\n'''\n'" + long + "' = 1"},
		{"b = \"\"\"\n" + dotted(99) + " = 1\"\"\"\"\nc = 1", "b = \"\"\"\\\"\"\"\"\"\"\n" + dotted(17) + " = 1"},
		{"# " + dotted(99) + "\n'" + dotted(99) + "' = '" + dotted(99) + "'", "a = '#'\n" + dotted(17) + "= 1"},
		{nested(16), nested(18)},
	} {
		if _, err := Parse("f.toml", []byte("\n"+c.good)); err != nil {
			t.Errorf("%.60q: %v", c.good, err)
		}
		var e *Error
		_, err := Parse("f.toml", []byte("\n"+c.bad))
		if !errors.As(err, &e) || e.Line != 2+strings.Count(c.bad, "\n") || !strings.Contains(e.Text, "at most 16") {
			t.Errorf("%.60q: %v", c.bad, err)
		}
	}
}

// checkParts holds the keys that the decoder found in a text that is taken to what can be written: a header, a key, and a key for
// each level within it.
func checkParts(t *testing.T, text string) {
	var values map[string]any
	meta, err := toml.Decode(text, &values)
	if err != nil {
		return
	}
	for _, key := range meta.Keys() {
		if len(key) > maxParts*(maxNesting+2) {
			t.Fatalf("a key of %d parts", len(key))
		}
	}
}
