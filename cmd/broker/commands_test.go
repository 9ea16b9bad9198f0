package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"keybroker/inject"
)

// root of the module, from this folder.
const moduleRoot = "../.."

// eachCommand visits every command but the one that stands for the program itself.
func eachCommand(visit func(c *cobra.Command, words []string)) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			visit(sub, strings.Fields(sub.CommandPath())[1:])
			walk(sub)
		}
	}
	walk(newRootCommand(&globals{}))
}

// call runs one command line in this process.
func call(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), &globals{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}, args)
	return status, out.String(), errs.String()
}

func TestEveryCommandIsDescribed(t *testing.T) {
	count := 0
	eachCommand(func(c *cobra.Command, words []string) {
		count++
		if c.Short == "" || strings.HasSuffix(c.Short, ".") || strings.Contains(c.Short, "\n") {
			t.Errorf("%s: Short is %q, expected one line without a full stop", strings.Join(words, " "), c.Short)
		}
		if c.Hidden {
			return
		}
		if status, out, _ := call(t, append(words, "--help")...); status != 0 || !strings.Contains(out, "Usage:") {
			t.Errorf("%s --help: status %d, %q", strings.Join(words, " "), status, out)
		}
	})
	if count < 30 {
		t.Errorf("%d commands", count)
	}
}

func TestManualAndCompletion(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man")
	if status, _, stderr := call(t, "man", dir); status != 0 || stderr != "" {
		t.Fatalf("man: status %d, %s", status, stderr)
	}
	eachCommand(func(c *cobra.Command, words []string) {
		if !c.IsAvailableCommand() {
			return
		}
		page, err := os.ReadFile(filepath.Join(dir, "keybroker-"+strings.Join(words, "-")+".1"))
		if err != nil || !bytes.Contains(page, []byte(".TH")) {
			t.Errorf("the page of %s: %v", strings.Join(words, " "), err)
		}
		for _, want := range []string{".SH EXIT STATUS\n", ".SH FILES\n", ".SH SEE ALSO\n"} {
			if bytes.Count(page, []byte(want)) != 1 {
				t.Errorf("the page of %s: %d times %q", strings.Join(words, " "), bytes.Count(page, []byte(want)), want)
			}
		}
		if odd := regexp.MustCompile(`fP(\[=|=""|=0\n).*`).Find(page); odd != nil {
			t.Errorf("the page of %s: %q", strings.Join(words, " "), odd)
		}
	})
	for _, shell := range []string{"bash", "zsh", "fish"} {
		status, out, stderr := call(t, "completion", shell)
		if status != 0 || stderr != "" || !strings.Contains(out, "keybroker") {
			t.Errorf("completion %s: status %d, %d octets, %s", shell, status, len(out), stderr)
		}
	}
}

// What a flag can be is completed.
func TestFlagsAreCompleted(t *testing.T) {
	for line, want := range map[string]string{
		"init --slot":                  "tpm2\npassphrase\n",
		"serve --log-level":            "debug\ninfo\nwarn\nerror\n",
		"serve --log-format":           "text\njson\n",
		"relay --log-format":           "text\njson\n",
		"explain --via":                "unix\ntcp\n",
		"endorsements fetch --product": "Milan\nGenoa\nTurin\n",
		"audit query --event":          "release\nrefusal\n",
		"audit query --tier":           "service\nvm\n",
		"audit query --decision":       "granted\nrefused\n",
	} {
		status, out, _ := call(t, append(append([]string{"__complete"}, strings.Fields(line)...), "")...)
		if status != exitOK || !strings.HasPrefix(out, want) {
			t.Errorf("%s: status %d, %q, expected %q", line, status, out, want)
		}
	}
}

// A mistake in the command line has status 2, one line that names the help, and no effect.
func TestMistakesInTheCommandLine(t *testing.T) {
	wrong := [][]string{{"nonsense"}, {"--nonsense"}, {"help", "nonsense"}, {"key", "get", "db", "--hex", "--base64"}}
	eachCommand(func(c *cobra.Command, words []string) {
		if c.DisableFlagParsing { // libvirt's hook, where a domain may be called anything
			return
		}
		wrong = append(wrong, append(slices.Clone(words), "--nonsense"))
		if c.Name() != "help" && c.Name() != "import" { // which take any number of words
			wrong = append(wrong, append(slices.Clone(words), "nonsense", "nonsense", "nonsense"))
		}
	})
	for _, args := range wrong {
		status, stdout, stderr := call(t, args...)
		if status != exitUsage || stdout != "" || !strings.HasPrefix(stderr, "keybroker: error: ") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: status %d, %q, %q", args, status, stdout, stderr)
		}
	}
}

// suggested finds the command lines of keybroker that a text tells the reader to type.
var suggested = regexp.MustCompile("`keybroker ([a-z][^`]*)`")

// literals are the strings in the module's Go code, by where they stand.
func literals(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(moduleRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
				if text, err := strconv.Unquote(l.Value); err == nil {
					found[files.Position(l.Pos()).String()] = text
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// What keybroker tells people to type exists, and has the flags that it cannot do without.
func TestSuggestedCommands(t *testing.T) {
	texts := literals(t)
	for _, name := range []string{"README.md", "SECURITY.md", "docs/audit.md", "docs/libvirt.md", "docs/policy.md", "docs/protocol.md", "docs/architecture.md", "docs/attestation.md", "docs/snp-guest.md"} {
		octets, err := os.ReadFile(filepath.Join(moduleRoot, name))
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(octets)
	}
	count := 0
	for where, text := range texts {
		for _, m := range suggested.FindAllStringSubmatch(text, -1) {
			count++
			if err := checkSuggested(m[1], strings.Contains(where, ".go:")); err != nil {
				t.Errorf("%s: `keybroker %s`: %v", where, m[1], err)
			}
		}
	}
	if count < 50 {
		t.Errorf("only %d commands seen", count)
	}
	for _, line := range []string{"audit reset", "init", "nonsense", "slot nonsense", "status --nonsense"} {
		if checkSuggested(line, true) == nil {
			t.Errorf("`keybroker %s` passes", line)
		}
	}
}

// without are the flags that a command wants always.
var without = map[string]string{"audit reset": "--reason", "init": "--slot"}

func checkSuggested(line string, whole bool) error {
	line, _, _ = strings.Cut(line, " && ")
	words := strings.Fields(line)
	c, rest, err := newRootCommand(&globals{}).Find(words)
	if err != nil || !c.HasParent() || c.HasSubCommands() && len(rest) > 0 && rest[0] != strings.ToUpper(rest[0]) {
		return fmt.Errorf("no such command")
	}
	for _, w := range words {
		if name, ok := strings.CutPrefix(w, "--"); ok && c.Flag(name) == nil && c.InheritedFlags().Lookup(name) == nil {
			return fmt.Errorf("no such flag: %s", w)
		}
	}
	path := strings.TrimPrefix(c.CommandPath(), "keybroker ")
	if flag := without[path]; whole && flag != "" && !slices.Contains(words, flag) && !slices.Contains(words, "--import") {
		return fmt.Errorf("it needs %s", flag)
	}
	return nil
}

// constants are the string constants of a Go file whose names begin with Code.
func constants(t *testing.T, path string) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(moduleRoot, path), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(v.Names[0].Name, "Code") || len(v.Values) != 1 {
			return true
		}
		if l, ok := v.Values[0].(*ast.BasicLit); ok {
			if text, err := strconv.Unquote(l.Value); err == nil {
				values = append(values, text)
			}
		}
		return true
	})
	if len(values) < 5 {
		t.Fatalf("%s has the codes %q alone", path, values)
	}
	return values
}

// documentedCode is a row of the table of refusals.
var documentedCode = regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\| ([0-9]{3}) \\|")

// docs/protocol.md has every code that there is and no other, each with its status.
func TestCodesAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(moduleRoot, "docs/protocol.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, m := range documentedCode.FindAllStringSubmatch(string(page), -1) {
		if documented[m[1]] != "" {
			t.Errorf("%s is documented twice", m[1])
		}
		documented[m[1]] = m[2]
	}
	codes := append(constants(t, "inject/refusal.go"), constants(t, "internal/policy/policy.go")...)
	slices.Sort(codes)
	codes = slices.Compact(codes)
	if names := slices.Sorted(maps.Keys(documented)); !slices.Equal(names, codes) {
		t.Errorf("documented are %q,\nthe code has %q", names, codes)
	}
	for code, status := range documented {
		if got := strconv.Itoa(inject.Code(code).HTTPStatus()); got != status {
			t.Errorf("%s: documented with status %s, it is %s", code, status, got)
		}
	}
}
