package launch

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// vectors are firmware and the digests that it must give; see the README there.
const vectors = "../../../shared/vectors/snp-measure"

func vector(t testing.TB, name string) []byte {
	t.Helper()
	octets, err := os.ReadFile(filepath.Join(vectors, name))
	if err != nil {
		t.Fatalf("the vectors must be there: %v", err)
	}
	return octets
}

func epyc(t testing.TB) uint32 {
	t.Helper()
	cpu, err := Signature("EPYC-v4")
	if err != nil {
		t.Fatal(err)
	}
	return cpu
}

// emptyFiles is a guest with empty kernel and initrd.
func emptyFiles(command string) *Boot {
	return &Boot{Kernel: sha256.Sum256(nil), Initrd: sha256.Sum256(nil), Append: command}
}

func TestVectors(t *testing.T) {
	cases := 0
	for line := range strings.Lines(string(vector(t, "cases.txt"))) {
		words := strings.Fields(line)
		if strings.HasPrefix(line, "# SHA-384 chain of the firmware alone") {
			var c chain
			firmware := vector(t, "ovmf_AmdSev_suffix.bin")
			c.data(pageNormal, size4GiB-uint64(len(firmware)), firmware)
			if got := hex.EncodeToString(c.digest[:]); got != words[len(words)-1] {
				t.Errorf("firmware alone: %s, not %s", got, words[len(words)-1])
			}
			cases++
		}
		if len(words) < 4 || words[0] == "#" {
			continue
		}
		cases++
		features, err := strconv.ParseUint(words[1], 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		command := strings.Join(words[2:len(words)-1], " ")
		if command == "-" {
			command = ""
		}
		g := Guest{Firmware: vector(t, words[0]), Boot: emptyFiles(command), CPU: epyc(t), Features: features}
		got, err := g.Digests(1, 1)
		if err != nil || len(got) != 1 || hex.EncodeToString(got[0][:]) != words[len(words)-1] {
			t.Errorf("%s: %x, %v", strings.TrimSpace(line), got, err)
		}
	}
	if cases < 5 {
		t.Errorf("only %d cases", cases)
	}
}

// A range gives for each number of processors what this number alone gives, all different.
func TestRange(t *testing.T) {
	g := Guest{Firmware: vector(t, "ovmf_AmdSev_suffix.bin"), Boot: emptyFiles(""), CPU: epyc(t), Features: 1}
	all, err := g.Digests(1, 64)
	if err != nil || len(all) != 64 {
		t.Fatalf("%d digests, %v", len(all), err)
	}
	seen := map[Digest]bool{}
	for i, d := range all {
		one, err := g.Digests(i+1, i+1)
		if err != nil || one[0] != d || seen[d] {
			t.Errorf("%d processors: %v", i+1, err)
		}
		seen[d] = true
	}
	for _, r := range [][2]int{{0, 1}, {2, 1}, {1, MaxVCPUs + 1}, {-1, -1}} {
		if d, err := g.Digests(r[0], r[1]); err == nil || d != nil {
			t.Errorf("%v: no error", r)
		}
	}
}

// Everything that decides changes the digest.
func TestWhatIsMeasured(t *testing.T) {
	seen := map[Digest]string{}
	for name, change := range map[string]func(g *Guest){
		"nothing":  func(*Guest) {},
		"kernel":   func(g *Guest) { g.Boot.Kernel[0]++ },
		"initrd":   func(g *Guest) { g.Boot.Initrd[31]++ },
		"append":   func(g *Guest) { g.Boot.Append = "x" },
		"no boot":  func(g *Guest) { g.Boot = nil },
		"cpu":      func(g *Guest) { g.CPU++ },
		"features": func(g *Guest) { g.Features = 3 },
		"firmware": func(g *Guest) { g.Firmware[0]++ },
	} {
		g := Guest{Firmware: vector(t, "ovmf_AmdSev_suffix.bin"), Boot: emptyFiles(""), CPU: epyc(t), Features: 1}
		change(&g)
		d, err := g.Digests(2, 2)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if other := seen[d[0]]; other != "" {
			t.Errorf("%s and %s have one digest", name, other)
		}
		seen[d[0]] = name
	}
}

func TestWrongGuests(t *testing.T) {
	good := vector(t, "ovmf_AmdSev_suffix.bin")
	for name, c := range map[string]struct {
		guest Guest
		want  string
	}{
		"no firmware":    {Guest{Features: 1}, "expected whole pages"},
		"half a page":    {Guest{Firmware: good[:2048], Features: 1}, "expected whole pages"},
		"zeros":          {Guest{Firmware: make([]byte, 8192), Features: 1}, "no table of OVMF's"},
		"no SNP feature": {Guest{Firmware: good, Features: 2}, "bit 0"},
		"kernel without a section for hashes": {Guest{Firmware: vector(t, "ovmf_OvmfX64_suffix.bin"), Boot: emptyFiles(""), Features: 1},
			"does not check the kernel"},
	} {
		if d, err := c.guest.Digests(1, 1); err == nil || d != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The same firmware without a kernel is fine.
	g := Guest{Firmware: vector(t, "ovmf_OvmfX64_suffix.bin"), Features: 1}
	if _, err := g.Digests(1, 1); err != nil {
		t.Error(err)
	}
}

func TestSignature(t *testing.T) {
	for name, want := range map[string]uint32{
		"EPYC": 0x800f12, "EPYC-v4": 0x800f12, "EPYC-IBPB": 0x800f12, "EPYC-Rome-v2": 0x830f10, "EPYC-Milan": 0xa00f11, "EPYC-Genoa-v1": 0xa10f10, "EPYC-Turin": 0xb00f00,
	} {
		if got, err := Signature(name); err != nil || got != want {
			t.Errorf("%s: %#x, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "host", "EPYC-", "EPYC-v", "EPYC-Vega", "epyc", "EPYC-Rome-v2x"} {
		if _, err := Signature(name); err == nil {
			t.Errorf("%q is a processor", name)
		}
	}
}

// Lengths and offsets of a firmware are held against its size, and no table makes the work unbounded.
func FuzzFirmware(f *testing.F) {
	f.Add(vector(f, "ovmf_AmdSev_suffix.bin"))
	f.Add(vector(f, "ovmf_OvmfX64_suffix.bin"))
	f.Fuzz(func(t *testing.T, tail []byte) {
		if len(tail) > pageSize {
			return
		}
		page := make([]byte, pageSize)
		copy(page[pageSize-len(tail):], tail)
		parsed, err := parseFirmware(page)
		if (parsed == nil) != (err != nil) {
			t.Fatalf("%v, %v", parsed, err)
		}
		if err != nil {
			return
		}
		total := uint64(0)
		for _, s := range parsed.sections {
			total += s.size
		}
		if total > 1<<24 {
			return // minutes of hashing; the number of sections and their sizes are bounded
		}
		g := Guest{Firmware: page, Boot: emptyFiles(""), Features: 1}
		a, err := g.Digests(1, 3)
		b, again := g.Digests(1, 3)
		if (err == nil) != (again == nil) || len(a) != len(b) || (err == nil) != (len(a) == 3) {
			t.Fatalf("%v, %v", err, again)
		}
	})
}

// Every length in the tables at the end, as 0 and as the greatest.
func TestBrokenFirmware(t *testing.T) {
	good := vector(t, "ovmf_AmdSev_suffix.bin")
	for at := range len(good) - 4 {
		for _, n := range []uint32{0, 1 << 31, 1<<32 - 1} {
			broken := bytes.Clone(good)
			binary.LittleEndian.PutUint32(broken[at:], n)
			if _, err := parseFirmware(broken); err != nil && !strings.HasPrefix(err.Error(), "reading firmware") {
				t.Fatal(err)
			}
		}
	}
}

func BenchmarkDigests(b *testing.B) {
	firmware := append(make([]byte, 4<<20-pageSize), vector(b, "ovmf_AmdSev_suffix.bin")...)
	for name, most := range map[string]int{"1": 1, "64": 64} {
		b.Run("4MiB-"+name, func(b *testing.B) {
			g := Guest{Firmware: firmware, Boot: emptyFiles(""), CPU: epyc(b), Features: 1}
			b.SetBytes(int64(len(firmware)))
			for b.Loop() {
				if _, err := g.Digests(1, most); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
