// Package keybroker_test holds the module itself to what docs/architecture.md says of it.
package keybroker_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// module is how the paths of our own packages begin.
const module = "keybroker/"

// mayImport says what else of ours a package, and each package below it, may import: the arrows point one way.
var mayImport = map[string][]string{
	"derive":     leaves,
	"seal":       leaves,
	"attest":     leaves,
	"hypervisor": leaves,
	"inject":     append([]string{"derive", "hypervisor"}, leaves...),
}

// leaves import nothing of ours.
var leaves = []string{"internal/octet", "internal/plain", "internal/tuple"}

// heavy is what the guest's agent must do without.
var heavy = []string{
	"github.com/digitalocean/go-libvirt", "go.etcd.io/bbolt", "github.com/spf13/cobra", "github.com/google/go-tpm", "github.com/prometheus/",
	"github.com/google/go-sev-guest", module + "attest",
}

// within reports whether a package is another one or below it.
func within(path, parent string) bool { return path == parent || strings.HasPrefix(path, parent+"/") }

// wrongArrow says what is wrong with one package of ours importing another, or "".
func wrongArrow(from, to string) string {
	if within(to, "cmd") {
		return "nothing imports a command"
	}
	if within(to, "internal/daemon") && from != "cmd/broker" && !within(from, "e2e") {
		return "only cmd/broker runs the broker"
	}
	if within(to, "attest/snp/keyservice") && from != "cmd/broker" {
		return "a release asks no network: only a command fetches endorsements"
	}
	if slices.Contains(leaves, from) {
		return "it imports nothing of ours"
	}
	for top, allowed := range mayImport {
		if within(from, top) && !within(to, top) && !slices.Contains(allowed, to) {
			return "it may import of ours only " + strings.Join(allowed, ", ")
		}
	}
	return ""
}

// goList runs go list and returns its lines.
func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestArrows(t *testing.T) {
	arrows := 0
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...") {
		words := strings.Fields(line)
		from, ours := strings.CutPrefix(words[0], module)
		for _, path := range words[1:] {
			to, oursToo := strings.CutPrefix(path, module)
			if !ours || !oursToo {
				continue
			}
			arrows++
			if why := wrongArrow(from, to); why != "" {
				t.Errorf("%s imports %s: %s", from, to, why)
			}
		}
	}
	if arrows < 20 {
		t.Errorf("only %d imports seen", arrows)
	}
}

func TestAgentIsLight(t *testing.T) {
	deps := goList(t, "-deps", "./cmd/guest-agent")
	if !slices.Contains(deps, module+"inject/sink") {
		t.Fatal("this is not the agent's list")
	}
	for _, path := range deps {
		if slices.ContainsFunc(heavy, func(h string) bool { return strings.HasPrefix(path, h) }) {
			t.Errorf("the agent links %s", path)
		}
	}
}

// The README names every module that this one imports, with its reason, and no other.
func TestDependenciesAreNamed(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "## Dependencies\n")
	table, _, _ = strings.Cut(table, "\nCryptography")
	var named []string
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 || strings.Contains(cells[1], "---") || strings.TrimSpace(cells[1]) == "module" {
			continue
		}
		if strings.TrimSpace(cells[2]) == "" {
			t.Errorf("no reason for %s", cells[1])
		}
		for name := range strings.SplitSeq(cells[1], ",") {
			named = append(named, strings.TrimSpace(name))
		}
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	imported := 0
	for line := range strings.Lines(string(mod)) {
		words := strings.Fields(line)
		if len(words) != 2 || !strings.Contains(words[0], ".") {
			continue // also what is "// indirect"
		}
		imported++
		if !slices.ContainsFunc(named, func(n string) bool { return words[0] == n || strings.HasSuffix(words[0], "/"+n) }) {
			t.Errorf("%s is not in the README's table", words[0])
		}
	}
	if imported != len(named) || imported < 10 {
		t.Errorf("%d modules are imported, %d are named: %q", imported, len(named), named)
	}
}

// The rules themselves: each forbids something.
func TestWrongArrow(t *testing.T) {
	for arrow, allowed := range map[[2]string]bool{
		{"derive", "internal/tuple"}: true, {"derive", "seal"}: false, {"internal/octet", "internal/tuple"}: false, {"seal/tpm2", "seal"}: true, {"seal/tpm2", "derive"}: false,
		{"hypervisor/libvirt", "hypervisor"}: true, {"hypervisor/libvirt", "internal/policy"}: false, {"attest/snp", "derive"}: false,
		{"attest/snp", "attest"}: true, {"attest/snp", "internal/daemon"}: false, {"attest", "hypervisor"}: false, {"inject", "attest/snp"}: false,
		{"inject", "derive"}: true, {"inject", "seal"}: false, {"inject/sink", "internal/store"}: false, {"inject", "hypervisor/libvirt"}: false,
		{"e2e", "cmd/broker"}: false, {"cmd/broker", "internal/daemon"}: true, {"cmd/broker", "attest/snp/keyservice"}: true,
		{"internal/daemon", "attest/snp/keyservice"}: false, {"attest/snp/endorsements", "attest/snp/keyservice"}: false, {"cmd/guest-agent", "internal/daemon"}: false,
		{"e2e/lab", "internal/daemon"}: true, {"internal/policy", "internal/daemon"}: false, {"internal/policy", "derive"}: true,
	} {
		if why := wrongArrow(arrow[0], arrow[1]); (why == "") != allowed {
			t.Errorf("%s to %s: %q", arrow[0], arrow[1], why)
		}
	}
}
