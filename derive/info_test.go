package derive

import (
	"bytes"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"keybroker/internal/tuple"
)

const testSubject = "11111111-2222-3333-4444-555555555555"

// DO NOT CHANGE: every key that was ever derived depends on these octets.
func TestInfoGolden(t *testing.T) {
	service := func(name string, epoch uint32, length int) []byte {
		b, err := ServiceInfo(name, epoch, length)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	vm := func(tier, name string, epoch uint32, length int) []byte {
		b, err := VMInfo(tier, testSubject, name, epoch, length)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const key = "00" + "00000010" + "6b657962726f6b65722f7631206b6579" // 0x00, "keybroker/v1 key"
	const subject = "00000024" + "31313131313131312d323232322d333333332d343434342d353535353535353535353535"
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"service, epoch 1", service("my-database", 1, 32), "6d792d6461746162617365"},
		{"service, epoch 1, 64", service("my-database", 1, 64), "6d792d6461746162617365"},
		{"service, epoch 2", service("my-database", 2, 32), key + "00000007" + "73657276696365" + "00000000" +
			"0000000b" + "6d792d6461746162617365" + "00000004" + "00000002" + "00000004" + "00000020"},
		{"vm", vm(TierVM, "disk", 1, 64), key + "00000002" + "766d" + subject +
			"00000004" + "6469736b" + "00000004" + "00000001" + "00000004" + "00000040"},
		{"snp", vm(TierSNP, "disk", 258, 32), key + "00000003" + "736e70" + subject +
			"00000004" + "6469736b" + "00000004" + "00000102" + "00000004" + "00000020"},
		{"realm id", RealmIDInfo(), "00" + "00000015" + "6b657962726f6b65722f7631207265616c6d206964"},
		{"identity", IdentityInfo(1), "00" + "00000015" + "6b657962726f6b65722f7631206964656e74697479" +
			"00000004" + "00000001"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s: info is %s, want %s", c.name, got, c.want)
		}
	}
}

func TestCheckKeyName(t *testing.T) {
	for _, name := range []string{"a", "0", "ab", "a-b", "a.b", "a--b", "my-database", "x..y", strings.Repeat("a", 63)} {
		if err := CheckKeyName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "-", ".", "-a", "a-", ".a", "a.", "A", "a b", "a/b", "a_b", "a\x00b", "\x00a", "ä",
		"a\n", strings.Repeat("a", 64)} {
		if CheckKeyName(name) == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}

func TestCheckSubject(t *testing.T) {
	for _, s := range []string{testSubject, "abcdef01-2345-6789-abcd-ef0123456789"} {
		if err := CheckSubject(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", "web1", strings.ToUpper("abcdef01-2345-6789-abcd-ef0123456789"),
		"{1111111-2222-3333-4444-55555555555}", "11111111222233334444555555555555", testSubject + "0",
		"111111112-222-3333-4444-555555555555", "1111111g-2222-3333-4444-555555555555"} {
		if CheckSubject(s) == nil {
			t.Errorf("%q was accepted", s)
		}
	}
}

func TestInfoRefuses(t *testing.T) {
	for _, length := range []int{-32, 0, 16, 31, 33, 63, 65, 8160} {
		if _, err := ServiceInfo("a", 1, length); err == nil {
			t.Errorf("a service key of %d octets was accepted", length)
		}
		if _, err := VMInfo(TierVM, testSubject, "a", 1, length); err == nil {
			t.Errorf("a VM key of %d octets was accepted", length)
		}
	}
	for _, tier := range []string{"", "service", "container", "user", "VM", "vm "} {
		if _, err := VMInfo(tier, testSubject, "a", 1, 32); err == nil {
			t.Errorf("tier %q was accepted", tier)
		}
	}
	for what, err := range map[string]error{
		"service epoch 0": second(ServiceInfo("a", 0, 32)),
		"vm epoch 0":      second(VMInfo(TierVM, testSubject, "a", 0, 32)),
		"no name":         second(VMInfo(TierVM, testSubject, "", 1, 32)),
		"no subject":      second(VMInfo(TierVM, "", "a", 1, 32)),
	} {
		if err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// A key that was typed where a name belongs does not show in the error.
func TestErrorsDoNotEcho(t *testing.T) {
	for _, c := range []error{
		CheckKeyName("q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k="),
		CheckSubject("q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83v"),
	} {
		if strings.Contains(c.Error(), "q83v") || strings.Contains(c.Error(), "ASNF") {
			t.Errorf("the error shows what was given: %v", c)
		}
	}
}

func TestKeyInfoAllowList(t *testing.T) {
	service2, _ := ServiceInfo("a", 2, 32)
	vm, _ := VMInfo(TierVM, testSubject, "disk", 1, 64)
	for _, c := range []struct {
		info   []byte
		length int
	}{{[]byte("a"), 32}, {[]byte("a"), 64}, {service2, 32}, {vm, 64}} {
		if err := checkKeyInfo(c.info, c.length); err != nil {
			t.Errorf("%q: %v", c.info, err)
		}
	}
	key := func(fields ...[]byte) []byte { return info(labelKey, fields...) }
	u32, s := tuple.Uint32, func(s string) []byte { return []byte(s) }
	for name, c := range map[string]struct {
		info   []byte
		length int
	}{
		"empty":               {nil, 32},
		"zero octet":          {[]byte{0}, 32},
		"realm id":            {RealmIDInfo(), 32},
		"realm id, 16":        {RealmIDInfo(), RealmIDSize},
		"identity":            {IdentityInfo(1), 32},
		"identity 0":          {IdentityInfo(0), 32},
		"another length":      {vm, 32},
		"a service's length":  {service2, 64},
		"name, 33":            {[]byte("a"), 33},
		"name with zero":      {[]byte("a\x00"), 32},
		"upper case":          {[]byte("A"), 32},
		"cut":                 {vm[:len(vm)-1], 64},
		"longer":              {append(bytes.Clone(vm), 0), 64},
		"one field more":      {append(bytes.Clone(vm), 0, 0, 0, 0), 64},
		"fields short":        {key(s("vm"), s(testSubject), s("disk"), u32(1)), 64},
		"service epoch 1":     {key(s("service"), nil, s("a"), u32(1), u32(32)), 32},
		"service epoch 0":     {key(s("service"), nil, s("a"), u32(0), u32(32)), 32},
		"service subject":     {key(s("service"), s(testSubject), s("a"), u32(2), u32(32)), 32},
		"user tier":           {key(s("user"), s(testSubject), s("a"), u32(1), u32(32)), 32},
		"epoch of 5 octets":   {key(s("vm"), s(testSubject), s("a"), s("\x00\x00\x00\x00\x01"), u32(32)), 32},
		"another label":       {info("keys", s("vm"), s(testSubject), s("a"), u32(1), u32(32)), 32},
		"another product":     {append([]byte{0}, tuple.Encode(s("keybroker/v2 key"), s("vm"), s(testSubject), s("a"), u32(1), u32(32))...), 32},
		"length field cut":    {append([]byte{0}, 0xff, 0xff, 0xff, 0xff), 32},
		"tuple without zero":  {vm[1:], 64},
		"zero before a name":  {[]byte("\x00a"), 32},
		"name in quotes":      {[]byte(`"a"`), 32},
		"name with a newline": {[]byte("a\n"), 32},
	} {
		if checkKeyInfo(c.info, c.length) == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestSplitTuple(t *testing.T) {
	fields := [][]byte{[]byte("a"), {}, []byte("bc")}
	got, err := splitTuple(tuple.Encode(fields...), 3)
	if err != nil || !slices.EqualFunc(got, fields, bytes.Equal) {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := splitTuple(tuple.Encode(fields...), 2); err == nil {
		t.Error("a limit of 2 let 3 fields pass")
	}
}
